"""Tokenizers built for a task, read from folders, and the identity of each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from research.errors import ConfigError
from research.text.tokenizer import build_tokenizer, characters_of, tokenizer_sha256

SENTENCES = ["Tom has 3 apples and 4 pears.", "Tom buys 4 apples, so 3 + 4 = 7.", "naïve café Ω \U0001f34e"] * 3


def test_characters_are_numbered_by_code_point_behind_pad_and_eos() -> None:
    tokenizer = build_tokenizer("characters", alphabet="20+1=")
    assert tokenizer.get_vocab() == {"<pad>": 0, "<eos>": 1, "+": 2, ".": 3, "0": 4, "1": 5, "2": 6, "=": 7}
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert tokenizer("12+0=").input_ids == [5, 6, 2, 4, 7]
    assert tokenizer.decode([5, 6, 2, 4, 7]) == "12+0="


def test_blanks_and_newlines_are_characters_like_others() -> None:
    text = " a\n\n b  \t"
    tokenizer = build_tokenizer("characters", alphabet=text)
    assert len(tokenizer(text).input_ids) == len(text)
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_the_alphabet_is_known_for_character_tokenizers_alone(gpt2_like: PreTrainedTokenizerFast) -> None:
    assert characters_of(build_tokenizer("characters", alphabet="ab")) == {"a", "b", "."}
    assert characters_of(gpt2_like) is None


def test_byte_pairs_write_any_text_and_read_it_back() -> None:
    tokenizer = build_tokenizer("bpe", texts=SENTENCES, vocab_size=300)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert 258 < len(tokenizer) <= 300
    for text in [*SENTENCES, "  unseen\n\n\ttext\x00 漢字 "]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer("apples").input_ids) < len("apples")


def test_p76_equal_texts_give_equal_byte_pairs_in_every_process() -> None:
    program = (
        "import sys, json; from research.text.tokenizer import build_tokenizer, tokenizer_sha256;"
        "print(tokenizer_sha256(build_tokenizer('bpe', texts=json.loads(sys.argv[1]), vocab_size=300)))"
    )
    here = tokenizer_sha256(build_tokenizer("bpe", texts=iter(SENTENCES), vocab_size=300))
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(SENTENCES)],
        env={"PYTHONHASHSEED": "3", "RAYON_NUM_THREADS": "2", "PATH": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == here


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_a_saved_tokenizer_is_the_same_tokenizer(kind: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(kind, alphabet="0123456789+=;#", texts=SENTENCES, vocab_size=300)
    identity = tokenizer_sha256(tokenizer)
    tokenizer("1+2=", truncation=True, max_length=2, padding="max_length")
    assert tokenizer_sha256(tokenizer) == identity
    tokenizer.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    again = build_tokenizer(str(tmp_path))
    for other in (plain, again):
        assert tokenizer_sha256(other) == identity
        assert other("1+2=3").input_ids == tokenizer("1+2=3").input_ids
        assert (other.pad_token_id, other.eos_token_id) == (0, 1)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "gpt2"])
def test_a_tokenizer_is_the_same_beside_any_model(model_type: str, tmp_path: Path) -> None:
    """AutoTokenizer would read one beside a Qwen2 with that model's rules, and one token more."""
    tokenizer = build_tokenizer("bpe", texts=["two and two make 4", "let us add 12345"] * 9, vocab_size=270)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    again = build_tokenizer(str(tmp_path))
    assert len(again) == len(tokenizer) and tokenizer_sha256(again) == tokenizer_sha256(tokenizer)
    assert again("let's add 12 and 345 ").input_ids == tokenizer("let's add 12 and 345 ").input_ids


def test_another_vocabulary_or_eos_is_another_identity() -> None:
    one = build_tokenizer("characters", alphabet="01+=")
    assert tokenizer_sha256(one) == tokenizer_sha256(build_tokenizer("characters", alphabet="=+10"))
    assert tokenizer_sha256(one) != tokenizer_sha256(build_tokenizer("characters", alphabet="012+="))
    other = build_tokenizer("characters", alphabet="01+=")
    other.eos_token = "="
    assert tokenizer_sha256(one) != tokenizer_sha256(other)


def test_pad_falls_back_to_eos(llama_like: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert llama_like.pad_token_id is None
    llama_like.save_pretrained(tmp_path)
    tokenizer = build_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_a_tokenizer_without_eos_is_refused(llama_like: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    llama_like.eos_token = None
    llama_like.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has no EOS token.*tokenizer\.eos_token = "):
        build_tokenizer(str(tmp_path))


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}))
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Mine: pass\nclass C: pass")
    with pytest.raises(ConfigError, match="'bpe'; it is a folder that holds nothing readable"):
        build_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_built_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs an alphabet"):
        build_tokenizer("characters")
    with pytest.raises(ConfigError, match="trained on texts and was given none"):
        build_tokenizer("bpe", texts=[""])
    with pytest.raises(ConfigError, match="vocab_size=257: tokenizer=bpe needs at least 258"):
        build_tokenizer("bpe", texts=SENTENCES, vocab_size=257)
    with pytest.raises(ConfigError, match=r"neither 'characters' nor 'bpe'; it is no folder"):
        build_tokenizer(str(tmp_path / "absent"))
    told = r"is a folder that holds no tokenizer, none of tokenizer\.json, .*"
    with pytest.raises(ConfigError, match=told + r"save one into it with tokenizer\.save_pretrained"):
        build_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))  # the library makes one of no tokens
    with pytest.raises(ConfigError, match=told):
        build_tokenizer(str(tmp_path))
    build_tokenizer("characters", alphabet="ab").save_pretrained(tmp_path / "student")
    with pytest.raises(ConfigError, match=rf"{told}; give {tmp_path / 'student'}, or give another folder"):
        build_tokenizer(str(tmp_path))
