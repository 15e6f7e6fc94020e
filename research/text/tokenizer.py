"""Tokenizers: small ones built for the task at hand, and any pretrained one."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from research.errors import ConfigError
from research.text.hub import TOKENIZER_FILES, holds_tokenizer, source_of, why_unread

PAD, EOS = "<pad>", "<eos>"
GENERAL_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")  # of no model in particular
FILLER = "."  # what trace_format=filler_then_answer writes in the place of a chain
NUM_BYTES = 256


def build_tokenizer(
    kind: str, *, alphabet: str | None = None, texts: Iterable[str] | None = None, vocab_size: int = 1024
) -> PreTrainedTokenizerFast:
    """A tokenizer with pad and EOS ids.

    kind  "characters": one token per character of ``alphabet`` (and the filler ``.``), pad 0, EOS 1, then the
          characters by code point. It has no unknown token: other characters are refused
          "bpe": byte-level byte-pair encoding trained on ``texts``, at most ``vocab_size`` tokens; equal texts give
          equal tokenizers
          else a folder or a Hub id, read with AutoTokenizer and without remote code; where it has no pad token, pad is
          its EOS

    Raises ConfigError where an argument is missing, and for a pretrained tokenizer that cannot be read or has no EOS.
    """
    if kind == "characters":
        return _characters(alphabet)
    if kind == "bpe":
        return _byte_pairs(texts, vocab_size)
    return _pretrained(kind)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides which ids a text gets: vocabulary, merges, rules, special tokens; not the chat template.

    The same after saving and loading, and whatever truncation or padding was last asked for.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    told = {
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "rules": {key: value for key, value in rules.items() if key not in ("truncation", "padding")},
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def characters_of(tokenizer: PreTrainedTokenizerBase) -> frozenset[str] | None:
    """The only characters that the tokenizer can write, for one built as "characters"; None for any other."""
    if not isinstance(tokenizer.backend_tokenizer.model, models.WordLevel):
        return None
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    return frozenset(words) if all(len(word) == 1 for word in words) else None


def _characters(alphabet: str | None) -> PreTrainedTokenizerFast:
    if not alphabet:
        raise ConfigError(
            "tokenizer=characters needs an alphabet, the characters of the task and of the template; "
            "open text has none: take tokenizer=bpe or a pretrained tokenizer"
        )
    words = [PAD, EOS, *sorted(set(alphabet) | {FILLER})]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return _wrapped(backend)


def _byte_pairs(texts: Iterable[str] | None, vocab_size: int) -> PreTrainedTokenizerFast:
    smallest = NUM_BYTES + len((PAD, EOS))
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size={vocab_size!r}: tokenizer=bpe needs at least {smallest}, all bytes, pad and EOS")
    read = [text for text in texts or () if text]
    if not read:
        raise ConfigError("tokenizer=bpe is trained on texts and was given none")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(PAD, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(read, trainer)
    return _wrapped(backend)


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def _is_general(folder: Path) -> bool:
    """Whether tokenizer.json is all there is to a folder's tokenizer, as of every tokenizer that is made here.

    By the folder's config.json AutoTokenizer would take it for a model's own all the same: what lies beside a Qwen2 is
    read with Qwen2's rules and one token more.
    """
    path = folder / "tokenizer_config.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return told.get("tokenizer_class") in GENERAL_CLASSES and (folder / "tokenizer.json").is_file()


def _pretrained(name: str) -> PreTrainedTokenizerFast:
    if Path(name).is_dir() and not holds_tokenizer(Path(name)):
        below = [folder.name for folder in sorted(Path(name).iterdir()) if folder.is_dir() and holds_tokenizer(folder)]
        advice = f"give {Path(name) / below[0]}" if below else "save one into it with tokenizer.save_pretrained(folder)"
        raise ConfigError(
            f"tokenizer={name!r} is a folder that holds no tokenizer, none of {', '.join(TOKENIZER_FILES)}; {advice}, "
            "or give another folder, a hub id, characters or bpe"
        )
    try:
        source = source_of(name)
        reader = PreTrainedTokenizerFast if _is_general(Path(source)) else AutoTokenizer
        tokenizer = reader.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of a dozen kinds: no such folder, no such repository, no network, remote code, ...
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"tokenizer={name!r} is neither 'characters' nor 'bpe'; {why_unread(name)}: {told}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"tokenizer={name!r} is a {type(tokenizer).__name__}, a tokenizer without tokenizer.json, which does not "
            "tell the place of its tokens; take the fast tokenizer of the same vocabulary"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"tokenizer={name!r} has no EOS token, so that a student could never learn to stop; "
            'set one and save it: tokenizer.eos_token = "..."; tokenizer.save_pretrained(folder)'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
