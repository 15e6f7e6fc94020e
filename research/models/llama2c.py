"""Checkpoints of llama2.c (github.com/karpathy/llama2.c) as Hugging Face folders: a Llama and its tokenizer.

The `.bin` file is seven int32 (dim, hidden, layers, heads, key-value heads, vocabulary, positions), then float32
matrices in a fixed order; a negative vocabulary says that the output head is stored apart. The tokenizer file is an
int32, then for every token a float32 score, an int32 length and its bytes.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from research.errors import CheckpointError
from research.models.language import write_folder

HEADER = struct.Struct("<7i")
NORM_EPS = 1e-5
UNKNOWN, DOCUMENT = 0, 1  # <s> opens every story, so it is also what ends one: </s> (2) was never trained
FIRST_BYTE, NUM_BYTES = 3, 256
SPACE = "\u2581"  # how SentencePiece writes a space


@dataclass(frozen=True)
class Header:
    """The sizes of a checkpoint, in file order; `vocab_size` is negative where the head is not the embedding."""

    dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_positions: int


def convert_llama2c(source: Path, output: Path) -> int:
    """Write the checkpoint and tokenizer found in `source` to the folder `output`; returns the parameters' number.

    Raises CheckpointError where `source` does not hold one `*.bin` checkpoint and one `tok*.bin`, or where they are
    damaged or do not belong together.
    """
    weights, vocabulary = _the_file(source, tokenizer=False), _the_file(source, tokenizer=True)
    model = read_model(weights)
    tokenizer = read_tokenizer(vocabulary)
    if len(tokenizer) != model.config.vocab_size:
        raise CheckpointError(
            f"{weights.name} has {model.config.vocab_size} tokens, {vocabulary.name} {len(tokenizer)}; "
            "give the tokenizer that the checkpoint was trained with"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_folder(model, output)
    tokenizer.save_pretrained(output)
    return sum(parameter.numel() for parameter in model.parameters())


def _the_file(source: Path, *, tokenizer: bool) -> Path:
    found = sorted(path for path in source.glob("*.bin") if path.name.startswith("tok") == tokenizer)
    if len(found) != 1:
        kind = "tokenizer tok*.bin" if tokenizer else "checkpoint *.bin"
        named = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"{source} holds {named} where one llama2.c {kind} is expected")
    return found[0]


def read_model(path: Path) -> Any:
    """The `LlamaForCausalLM` of a checkpoint file, in float32. Raises CheckpointError where the file is damaged."""
    from transformers import LlamaConfig, LlamaForCausalLM

    header, values = _read_checkpoint(path)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and then overwritten
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=abs(header.vocab_size),
                hidden_size=header.dim,
                intermediate_size=header.hidden_dim,
                num_hidden_layers=header.num_layers,
                num_attention_heads=header.num_heads,
                num_key_value_heads=header.num_kv_heads,
                max_position_embeddings=header.max_positions,
                rms_norm_eps=NORM_EPS,
                tie_word_embeddings=header.vocab_size > 0,
                bos_token_id=DOCUMENT,
                eos_token_id=DOCUMENT,
            )
        )
    model.load_state_dict(_state(header, values, path), strict=False)
    model.generation_config.pad_token_id = UNKNOWN
    return model.eval()


def _read_checkpoint(path: Path) -> tuple[Header, Tensor]:
    content = path.read_bytes()
    if len(content) < HEADER.size:
        raise CheckpointError(f"{path} is no llama2.c checkpoint: it has {len(content)} bytes")
    header = Header(*HEADER.unpack_from(content))
    sizes = (header.dim, header.hidden_dim, header.num_layers, header.num_heads, header.num_kv_heads)
    if min(*sizes, header.max_positions) < 1 or header.vocab_size == 0 or header.dim % header.num_heads:
        raise CheckpointError(f"{path} is no llama2.c checkpoint of the first format: its header reads {header}")
    if (len(content) - HEADER.size) % 4:
        raise CheckpointError(f"{path} is cut off: {len(content)} bytes are no whole number of float32 values")
    return header, torch.from_numpy(np.frombuffer(content, dtype="<f4", offset=HEADER.size).copy())


def _state(header: Header, values: Tensor, path: Path) -> dict[str, Tensor]:
    """The file's matrices under transformers' names; the order below is the file's."""
    dim, hidden, layers = header.dim, header.hidden_dim, header.num_layers
    head_dim = dim // header.num_heads
    kv_dim = head_dim * header.num_kv_heads
    stacks = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv_dim, dim),
        "self_attn.v_proj": (kv_dim, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    vocab = abs(header.vocab_size)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (vocab, dim)}
    shapes |= {name: (layers, *shape) for name, shape in stacks.items()} | {"norm": (dim,)}
    shapes["rotations"] = (header.max_positions, head_dim)  # cosines and sines, which transformers computes
    if header.vocab_size < 0:
        shapes["head"] = (vocab, dim)
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    if sum(sizes) != len(values):
        raise CheckpointError(f"{path} holds {len(values)} values, its header promises {sum(sizes)}; fetch it again")
    blocks = {
        name: block.reshape(shape) for (name, shape), block in zip(shapes.items(), values.split(sizes), strict=True)
    }
    for name, heads in (("self_attn.q_proj", header.num_heads), ("self_attn.k_proj", header.num_kv_heads)):
        blocks[name] = torch.stack([_halves(matrix, heads) for matrix in blocks[name]])
    state = {"model.embed_tokens.weight": blocks["embedding"], "model.norm.weight": blocks["norm"]}
    state["lm_head.weight"] = blocks.get("head", blocks["embedding"])
    for name in stacks:
        state |= {f"model.layers.{layer}.{name}.weight": blocks[name][layer] for layer in range(layers)}
    return state


def _halves(matrix: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix from neighbouring pairs (x0, y0, x1, y1, ..) to halves (x0, x1, .. y0, y1, ..).

    llama2.c rotates neighbours, transformers rotates the first half of a head against the second.
    """
    return matrix.reshape(heads, -1, 2, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)


def read_tokenizer(path: Path) -> Any:
    """The SentencePiece byte-pair encoding of a `tok*.bin` as a tokenizer of transformers.

    A text gets a leading space and `<s>` in front, as in training; characters outside the vocabulary become bytes.
    `<s>` is also EOS, since the next story's is what a story was trained to end with; pad is `<unk>`, which no text
    ever becomes.
    """
    from tokenizers import Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pieces = _read_pieces(path)
    vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise CheckpointError(f"{path} names a token twice; fetch it again")
    backend = Tokenizer(
        BPE(vocab=vocabulary, merges=_merges(pieces, vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", DOCUMENT)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<unk>",
        bos_token="<s>",
        eos_token="<s>",
        clean_up_tokenization_spaces=False,
    )


def _read_pieces(path: Path) -> list[tuple[str, float]]:
    """Every token as SentencePiece writes it, with its score, in order of id."""
    content, pieces, place = path.read_bytes(), [], 4
    try:
        while place < len(content):
            score, length = struct.unpack_from("<fi", content, place)
            piece = content[place + 8 : place + 8 + length]
            if length < 1 or len(piece) != length:
                raise ValueError(f"a token of {length} bytes at byte {place}")
            pieces.append((piece.decode(), score))
            place += 8 + length
    except (struct.error, ValueError) as error:
        raise CheckpointError(f"{path} is no llama2.c tokenizer: {error}") from None
    if len(pieces) < FIRST_BYTE + NUM_BYTES:
        raise CheckpointError(f"{path} is no llama2.c tokenizer: it holds {len(pieces)} tokens")
    special = [(name, score) for name, (_, score) in zip(("<unk>", "<s>", "</s>"), pieces, strict=False)]
    return special + [(piece.replace(" ", SPACE), score) for piece, score in pieces[FIRST_BYTE:]]


def _merges(pieces: list[tuple[str, float]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs that SentencePiece joins, best score first: every split of a piece into two others."""
    joined = pieces[FIRST_BYTE + NUM_BYTES :]
    return [
        (piece[:cut], piece[cut:])
        for piece, _ in sorted(joined, key=lambda item: -item[1])
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
