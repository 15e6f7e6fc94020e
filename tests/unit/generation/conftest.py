"""Tiny language models with random weights, a tokenizer whose decoding shows the ids, and a server that misbehaves."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCABULARY, CONTEXT = 31, 48
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": CONTEXT}
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


class Spelled:
    """Decodes ids to their numbers; encoding is never needed."""

    eos_ids = (1,)
    pad_id = 0

    def __init__(self) -> None:
        self.decoded: list[list[int]] = []

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded.append(list(ids))
        return " ".join(map(str, ids))

    def encode(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a completion was encoded")

    __call__ = encode


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of random weights, large enough for its distributions to be far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match family:
            case "llama":
                model: Any = LlamaForCausalLM(LlamaConfig(**{**IDS, **SIZES, **GROUPED, **changes}))
            case "qwen3":
                model = Qwen3ForCausalLM(Qwen3Config(**{**IDS, **SIZES, **GROUPED, **changes}))
            case "gpt2":
                sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
                model = GPT2LMHeadModel(GPT2Config(**IDS, **sizes, **changes))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.4)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def language_model() -> Callable[..., Any]:
    """`language_model("llama", seed=0, dtype=torch.float64)`: a fresh tiny model in eval mode."""
    return build


@pytest.fixture
def spelled() -> Spelled:
    return Spelled()


Act = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Speaks `/v1/completions` and `/v1/chat/completions`; does what the server's next act says, else answers."""

    protocol_version = "HTTP/1.1"
    wbufsize = 65536  # an answer in one packet
    server: "Misbehaving"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.headers.append(dict(self.headers))
            act = self.server.acts.pop(0) if self.server.acts else answer
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            act(self, body)

    def reply(
        self, status: int, payload: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)
        if length is not None:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        return


def document(body: dict[str, Any], choices: int | None = None) -> dict[str, Any]:
    """An honest answer: texts that name the prompt, the seed and the number of the choice."""
    count = body.get("n", 1) if choices is None else choices
    prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    texts = [f"{prompt}|{body['seed']}|{number}" for number in range(count)]
    rows: list[dict[str, Any]] = [
        {"index": number, "finish_reason": "length" if number % 2 else "stop", "text": text}
        for number, text in enumerate(texts)
    ]
    if "messages" in body:
        rows = [{**row, "message": {"role": "assistant", "content": row.pop("text")}} for row in rows]
    usage = {"prompt_tokens": 5, "completion_tokens": 7 * count}
    return {"object": "text_completion", "choices": rows[::-1], "usage": usage}


def answer(handler: Handler, body: dict[str, Any], choices: int | None = None) -> None:
    handler.reply(200, json.dumps(document(body, choices)).encode())


class Misbehaving(ThreadingHTTPServer):
    """A server on a free loopback port; `acts` are done one per request, in the order in which requests come."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.acts: list[Act] = []
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    """A running server that can be told to misbehave."""
    with Misbehaving() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def honest() -> Callable[..., None]:
    """`honest(handler, body, choices=2)` answers with so many choices, whatever was asked."""
    return answer
