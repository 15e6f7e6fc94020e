"""Tokenizers of the kinds that pretrained models bring along, trained in memory on a few sentences."""

from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "### Instruction:\nAdd 2, 3 and 4.\n\n### Response:\n2 + 3 = 5\n5 + 4 = 9\n\nAnswer: 9",
    "<think>\nTom has 3 apples. He buys 4 more, so 3 + 4 = 7.\n</think>\n\nThe answer is 7",
    "user assistant system [INST] [/INST] 0 1 2 3 4 5 6 7 8 9 . , : ; = # + - * / ( )",
]
EOS_LIST = ["</s>", "<|im_end|>", "<|im_start|>"]


def _wrapped(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def byte_level(add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind: no BOS, no unknown token, pad = EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [AddedToken(token, special=True) for token in EOS_LIST]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = _wrapped(backend, eos_token="</s>", pad_token="</s>")
    tokenizer.add_special_tokens({"extra_special_tokens": EOS_LIST[1:]})
    return tokenizer


def sentencepiece_like(prepend_scheme: str = "always", unknown: str | None = "<unk>") -> PreTrainedTokenizerFast:
    """Llama-2's kind: a space before every text, a BOS before every document, newlines as tokens of their own."""
    backend = Tokenizer(models.BPE(unk_token=unknown))
    words = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Split("\n", "isolated")])
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    special = [AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(backend, bos_token="<s>", eos_token="</s>", **({"unk_token": unknown} if unknown else {}))


def legacy_llama() -> PreTrainedTokenizerFast:
    """The first Llama's own rules: a normaliser writes the space, not only once but after every special token."""
    tokenizer = sentencepiece_like("never")
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "byte_level_prefixed": lambda: byte_level(add_prefix_space=True),
    "metaspace_always": sentencepiece_like,
    "metaspace_first": lambda: sentencepiece_like("first"),
    "legacy_llama": legacy_llama,
}


@pytest.fixture(params=KINDS)
def pretrained(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Each kind of tokenizer in turn."""
    return KINDS[request.param]()


@pytest.fixture
def gpt2_like() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture
def llama_like() -> PreTrainedTokenizerFast:
    return sentencepiece_like()


@pytest.fixture
def llama_like_without_unknown() -> PreTrainedTokenizerFast:
    return sentencepiece_like(unknown=None)
