"""A real pretrained model that this project did not train, and a checkpoint written here by hand."""

import gzip
import math
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from research.errors import CheckpointError
from research.models.llama2c import convert_llama2c, read_model, read_tokenizer

WINDOW = 512
SEPARATOR = "<|endoftext|>"
# What the tests of llama2.c itself expect this model to write at temperature 0.
GREEDY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\" "
    "Lily was sad and didn't know what to do. She said, \"I want to play with your ball, but I can't find it.\""
)


@pytest.fixture(scope="session")
def source(require_data: Callable[..., Path]) -> Path:
    return require_data("lm", "stories260K")


@pytest.fixture(scope="session")
def stories(require_data: Callable[..., Path]) -> list[str]:
    text = gzip.decompress(require_data("text", "tinystories_2MiB_sample.txt.gz").read_bytes()).decode()
    return [story for story in map(str.strip, text.split(SEPARATOR)) if story]


@pytest.fixture(scope="session")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    converted = tmp_path_factory.mktemp("stories260K")
    assert convert_llama2c(source, converted) == 260_032
    return converted


@pytest.fixture(scope="session")
def loaded(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer as plain transformers reads them."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def perplexity(model: Any, tokenizer: Any, stories: list[str]) -> float:
    """exp of the mean negative log likelihood of a token: each story after `<s>`, its first WINDOW tokens."""
    rows = sorted((tokenizer(story).input_ids[:WINDOW] for story in stories), key=len)
    total, count = 0.0, 0
    for start in range(0, len(rows), 32):
        batch = [torch.tensor(row) for row in rows[start : start + 32]]
        ids_BT = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        label_BT = torch.nn.utils.rnn.pad_sequence([row[1:] for row in batch], batch_first=True, padding_value=-100)
        with torch.no_grad():
            logits_BTV = model(ids_BT, use_cache=False).logits[:, : label_BT.shape[1]]
        total += float(F.cross_entropy(logits_BTV.flatten(0, 1), label_BT.flatten(), reduction="sum"))
        count += int((label_BT >= 0).sum())
    return math.exp(total / count)


def test_it_writes_what_the_original_writes(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    written = model.generate(prompt, max_new_tokens=145, do_sample=False)[0]
    assert tokenizer.decode(written, skip_special_tokens=True).startswith(GREEDY)


def test_the_known_ids_of_a_sentence(loaded: tuple[Any, Any]) -> None:
    """`<s>`, then the pieces of SentencePiece's rule: the pair of the best score is joined until none is left."""
    _, tokenizer = loaded
    assert tokenizer("Once upon a time").input_ids == [1, 403, 407, 261, 378]
    assert tokenizer.convert_ids_to_tokens([403, 407, 261, 378]) == ["▁Once", "▁upon", "▁a", "▁time"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 1, 0)


def test_perplexity_of_a_few_stories(loaded: tuple[Any, Any], stories: list[str]) -> None:
    assert perplexity(*loaded, stories[:20]) == pytest.approx(3.571, abs=0.002)


@pytest.mark.slow
def test_perplexity_of_the_sample_s_first_200_stories(loaded: tuple[Any, Any], stories: list[str]) -> None:
    """A pin of our own measurement: the first 200 stories; the data README says 4.38 and not on which part."""
    assert perplexity(*loaded, stories[:200]) == pytest.approx(4.384, abs=0.002)


@pytest.mark.slow
def test_perplexity_of_the_whole_sample(loaded: tuple[Any, Any], stories: list[str]) -> None:
    assert len(stories) == 2317
    assert perplexity(*loaded, stories) == pytest.approx(4.330, abs=0.002)


def joined_by_score(text: str, pieces: dict[str, tuple[int, float]]) -> list[int]:
    """The reference: the merge loop of llama2.c's run.c, one pair at a time, over a space and the text."""
    symbols: list[str] = []
    for character in " " + text:
        known = character in pieces
        symbols += [character] if known else [f"<0x{byte:02X}>" for byte in character.encode()]
    while True:
        pairs = [(pieces[a + b][1], -place) for place, (a, b) in enumerate(pairwise(symbols)) if a + b in pieces]
        if not pairs:
            return [pieces[symbol][0] for symbol in symbols]
        place = -max(pairs)[1]
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]


def pieces_of(path: Path) -> dict[str, tuple[int, float]]:
    content, place, pieces = path.read_bytes(), 4, {}
    while place < len(content):
        score, length = struct.unpack_from("<fi", content, place)
        pieces[content[place + 8 : place + 8 + length].decode()] = (len(pieces), score)
        place += 8 + length
    return pieces


TEXTS = ("Lily's café — 12 + 3 = 15!", "  two  spaces", "a\nb\n\nc\t", "日本 😀", "x", "", "<s> </s> of text")


def test_tokens_are_those_of_the_reference_and_texts_come_back(
    loaded: tuple[Any, Any], source: Path, stories: list[str]
) -> None:
    _, tokenizer = loaded
    pieces = pieces_of(source / "tok512.bin")
    for text in (*TEXTS[:-1], *(story[:300] for story in stories[::100])):
        ids = tokenizer(text).input_ids
        assert ids[0] == 1
        if text:
            assert ids[1:] == joined_by_score(text, pieces), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


# -- a checkpoint by hand ---------------------------------------------------------------------------------------------

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, POSITIONS = 8, 12, 2, 2, 1, 263, 16


def write_source(folder: Path, *, shared: bool = True, keep: int | None = None) -> dict[str, torch.Tensor]:
    """A random checkpoint, and a tokenizer of bytes, two letters and a space; returns the matrices by name."""
    generator = torch.Generator().manual_seed(0)
    kv = DIM // HEADS * KV_HEADS
    shapes = {
        "embedding": (VOCAB, DIM), "rms_att": (LAYERS, DIM), "wq": (LAYERS, DIM, DIM), "wk": (LAYERS, kv, DIM),
        "wv": (LAYERS, kv, DIM), "wo": (LAYERS, DIM, DIM), "rms_ffn": (LAYERS, DIM), "w1": (LAYERS, HIDDEN, DIM),
        "w2": (LAYERS, DIM, HIDDEN), "w3": (LAYERS, HIDDEN, DIM), "rms_final": (DIM,),
        "rotations": (POSITIONS, DIM // HEADS),
    }  # fmt: skip
    if not shared:
        shapes["wcls"] = (VOCAB, DIM)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB if shared else -VOCAB, POSITIONS)
    body = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    folder.mkdir(exist_ok=True)
    (folder / "tiny.bin").write_bytes((header + body)[:keep])
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256)), b"a", b"b", b"ab", b" "]
    tokens = b"".join(struct.pack("<fi", -float(n), len(piece)) + piece for n, piece in enumerate(pieces))
    (folder / "tok.bin").write_bytes(struct.pack("<i", 7) + tokens)
    return tensors


def forward(w: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """run.c written out: neighbours rotated, each key-value head shared by its group of query heads."""
    size = DIM // HEADS
    states = w["embedding"][tokens]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def rotated(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        for place in range(len(tokens)):
            for first in range(0, size, 2):
                angle = torch.tensor(place / 10_000 ** (first / size))
                even, odd = x[place, :, first], x[place, :, first + 1]
                out[place, :, first] = even * angle.cos() - odd * angle.sin()
                out[place, :, first + 1] = even * angle.sin() + odd * angle.cos()
        return out

    for layer in range(LAYERS):
        x = norm(states, w["rms_att"][layer])
        q = rotated((x @ w["wq"][layer].T).reshape(-1, HEADS, size))
        k = rotated((x @ w["wk"][layer].T).reshape(-1, KV_HEADS, size))
        v = (x @ w["wv"][layer].T).reshape(-1, KV_HEADS, size)
        mixed = torch.zeros(len(tokens), HEADS, size)
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            for place in range(len(tokens)):
                scores = k[: place + 1, group] @ q[place, head] / size**0.5
                mixed[place, head] = scores.softmax(0) @ v[: place + 1, group]
        states = states + mixed.reshape(-1, DIM) @ w["wo"][layer].T
        x = norm(states, w["rms_ffn"][layer])
        states = states + (F.silu(x @ w["w1"][layer].T) * (x @ w["w3"][layer].T)) @ w["w2"][layer].T
    return norm(states, w["rms_final"]) @ w.get("wcls", w["embedding"]).T


@pytest.mark.parametrize("shared", [True, False])
def test_logits_are_those_of_the_original_s_forward_pass(shared: bool, tmp_path: Path) -> None:
    weights = write_source(tmp_path / "source", shared=shared)
    convert_llama2c(tmp_path / "source", tmp_path / "out")
    tokens = [1, 259, 261, 3, 7, 260]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(
        model(torch.tensor([tokens])).logits[0].detach(), forward(weights, tokens), atol=1e-4, rtol=1e-4
    )
    assert model.config.tie_word_embeddings == shared
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("abc").input_ids == [1, 262, 261, 3 + ord("c")]


def test_converting_draws_no_random_numbers(tmp_path: Path) -> None:
    write_source(tmp_path)
    before = torch.get_rng_state()
    read_model(tmp_path / "tiny.bin")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("keep", "message"),
    [(0, "has 0 bytes"), (20, "has 20 bytes"), (-4, "its header promises"), (-1, "is cut off")],
)
def test_a_cut_checkpoint_is_refused(keep: int, message: str, tmp_path: Path) -> None:
    write_source(tmp_path, keep=keep)
    with pytest.raises(CheckpointError, match=message):
        read_model(tmp_path / "tiny.bin")


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds none where one llama2\.c checkpoint"):
        convert_llama2c(tmp_path, tmp_path / "out")
    write_source(tmp_path)
    (tmp_path / "other.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds other\.bin, tiny\.bin where one llama2\.c checkpoint"):
        convert_llama2c(tmp_path, tmp_path / "out")
    (tmp_path / "other.bin").write_bytes(b"\x00" * 64)
    with pytest.raises(CheckpointError, match=r"no llama2\.c checkpoint of the first format"):
        read_model(tmp_path / "other.bin")
    for content in (b"", b"\x00" * 4, b"\x07\x00\x00\x00" + b"\xff" * 11):
        (tmp_path / "tok.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"no llama2\.c tokenizer"):
            read_tokenizer(tmp_path / "tok.bin")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, source: Path) -> None:
    write_source(tmp_path)
    (tmp_path / "tok.bin").write_bytes((source / "tok512.bin").read_bytes())
    with pytest.raises(CheckpointError, match=r"tiny\.bin has 263 tokens, tok\.bin 512"):
        convert_llama2c(tmp_path, tmp_path / "out")


# -- the command ------------------------------------------------------------------------------------------------------


def test_convert_writes_a_folder_and_overwrites_none(distill: Callable[..., Any], tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    done = distill("convert", "source", "output=out", "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0 and "parameters and the tokenizer in out" in done.out, done.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == VOCAB
    again = distill("convert", "source=source", "output=out", "hydra.run.dir=run", cwd=tmp_path)
    assert "output is out, which holds a model already" in again.error
    done = distill("convert", "source", "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0 and (tmp_path / "run" / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "source is None; give the folder"),
        (("source=nowhere",), "source is 'nowhere'; give the folder"),
        (("format=gguf",), "format is 'gguf'. Valid: llama2c"),
        (("sourse=x",), "unknown key 'sourse'; nearest valid: source"),
    ],
)
def test_convert_names_what_is_wrong(
    arguments: tuple[str, ...], message: str, distill: Callable[..., Any], tmp_path: Path
) -> None:
    assert message in distill("convert", *arguments, "hydra.run.dir=run", cwd=tmp_path).error
