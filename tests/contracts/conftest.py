"""Pretrained networks in small: folders of the same architectures that stand in for hub ids, and data to match."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from research.text.tokenizer import build_tokenizer

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WIDTH: dict[str, int] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # a word of the hub id -> architecture and sizes
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 1024}),
    "Llama": ("llama", {**WIDTH, "num_key_value_heads": 1, "max_position_embeddings": 131072}),
    "Qwen2.5-Math": ("qwen2", {**WIDTH, "num_key_value_heads": 1, "max_position_embeddings": 4096}),
    "Qwen3": ("qwen3", {**WIDTH, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 40960}),
    "Qwen2.5": ("qwen2", {**WIDTH, "num_key_value_heads": 1, "max_position_embeddings": 131072}),
}
PADDING = {
    "gpt2": 0,
    "llama": 0,
    "qwen2": 271,
    "qwen3": 267,
}  # rows of the head beyond the tokenizer's ids, as published
PUPILS = ["Ann", "Bob", "Cleo", "Dan"]


def word_problem(number: int) -> dict[str, str]:
    name, apples = PUPILS[number % len(PUPILS)], number + 3
    question = f"{name} has {apples} apples and buys {number} more. How many are there?"
    chain = f"{name} has {apples}+{number}=<<{apples}+{number}={apples + number}>>{apples + number} apples."
    return {"question": question, "answer": f"{chain}\n#### {apples + number}"}


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`stand_in("Qwen/Qwen2.5-0.5B")`: a folder with that architecture in small, random weights, and a tokenizer.

    As in the published folders no token is for padding, and Qwen's head is wider than its tokenizer.
    """
    folder = tmp_path_factory.mktemp("pretrained")
    texts = [text for number in range(40) for text in word_problem(number).values()]
    texts.append("Instruction: Response: Answer: <think> </think>")

    def make(hub_id: str) -> Path:
        kind = next(kind for kind in KINDS if kind in hub_id)
        if not (folder / kind).exists():
            tokenizer = build_tokenizer("bpe", texts=texts, vocab_size=320)
            tokenizer.pad_token, tokenizer.chat_template = None, CHAT
            model_type, sizes = KINDS[kind]
            vocab_size, eos = len(tokenizer) + PADDING[model_type], tokenizer.eos_token_id
            config = transformers.AutoConfig.for_model(
                model_type, vocab_size=vocab_size, bos_token_id=None, eos_token_id=eos, **sizes
            )
            with torch.random.fork_rng():
                torch.manual_seed(0)
                transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)
            tokenizer.save_pretrained(folder / kind)
        return folder / kind

    return make


@pytest.fixture(scope="session")
def few_problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder whose GSM8K has 40 train problems, some of them validation, and 4 test problems."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "gsm8k").mkdir()
    for split, numbers in (("train", range(40)), ("test", range(100, 104))):
        lines = "".join(json.dumps(word_problem(number)) + "\n" for number in numbers)
        (folder / "gsm8k" / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


@pytest.fixture(scope="session")
def few_traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON lines file of 12 traces with reasoning between tags, as released sets have them."""
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    rows = []
    for number in range(12):
        problem = word_problem(number)
        chain, _, answer = problem["answer"].partition("\n#### ")
        rows.append({"problem": problem["question"], "solution": f"<think>\n{chain}\n</think>\n\n{answer}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
