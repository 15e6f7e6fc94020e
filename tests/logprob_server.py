"""A server on this machine that tells the logprobs of given ids, in the shapes that vLLM and SGLang document."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

Act = Callable[["Handler", Any], None]


class Handler(BaseHTTPRequestHandler):
    """GET /v1/models, POST /v1/completions and POST /generate; does what the server's next act says, else answers."""

    protocol_version = "HTTP/1.1"
    wbufsize = 65536
    server: "LogprobServer"

    def do_GET(self) -> None:
        if self.path != "/v1/models" or self.server.card is None:
            return self.reply(404, b'{"detail": "Not Found"}')
        card = {"object": "model", "created": int(time.time() * 1e6), **self.server.card}
        self.reply(200, json.dumps({"object": "list", "data": [card]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.asked.append((self.path, body))
            self.server.headers.append(dict(self.headers))
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
            act = self.server.acts.pop(0) if self.server.acts else answer
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                act(self, body)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def reply(self, status: int, payload: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(payload)
        self.close_connection = self.close_connection or length is not None

    def log_message(self, *_: Any) -> None:
        return


class LogprobServer(ThreadingHTTPServer):
    """`logits_of(ids) -> [T, V]` behind HTTP; `acts` are done one per request, in the order in which requests come.

    own          always: a row holds the token that follows, beside the K largest where it is none of them (vLLM)
                 never: the K largest alone
    max_logprobs the most that may be asked for, as vLLM's option
    spell        what a token is told to spell; None: nothing is told
    """

    daemon_threads = True

    def __init__(
        self,
        logits_of: Callable[[Sequence[int]], Tensor],
        *,
        model: str = "tiny",
        own: str = "always",
        max_logprobs: int = 20,
        spell: Callable[[int], str] | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.logits_of, self.own, self.max_logprobs, self.spell = logits_of, own, max_logprobs, spell
        self.card: dict[str, Any] | None = {"id": model, "owned_by": "tests", "max_model_len": 512}
        self.lock = threading.Lock()
        self.acts: list[Act] = []
        self.asked: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.busiest = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def text(self, token: int) -> str | None:
        return None if self.spell is None else self.spell(token)

    @torch.no_grad()
    def rows(self, ids: Sequence[int]) -> Tensor:
        """Logprobs [T, V], float32: row t is of the token after ids[t]."""
        return torch.log_softmax(self.logits_of(ids).float(), dim=-1)


def answer(handler: Handler, body: Any, change: Callable[[Any], Any] = lambda document: document) -> None:
    """The honest answer, or what `change` makes of it."""
    server = handler.server
    if handler.path == "/v1/completions":
        if body["prompt_logprobs"] > server.max_logprobs:
            words = (
                f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than max allowed: "
                f"{server.max_logprobs}"
            )
            return handler.reply(400, json.dumps({"error": {"message": words, "code": 400}}).encode())
        document: Any = completions(server, body)
    elif handler.path == "/generate":
        document = generated(server, body)
    else:
        return handler.reply(404, b'{"detail": "Not Found"}')
    handler.reply(200, json.dumps(change(document)).encode())


def completions(server: LogprobServer, body: Any) -> dict[str, Any]:
    """An answer of vLLM's /v1/completions."""
    prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
    choices = [
        {
            "index": number,
            "text": "?",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "prompt_logprobs": prompt_logprobs(server, ids, body["prompt_logprobs"]),
        }
        for number, ids in enumerate(prompts)
    ]
    usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": len(prompts)}
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "model": body["model"],
        "choices": choices[::-1],
        "usage": usage,
    }


def prompt_logprobs(server: LogprobServer, ids: Sequence[int], num_kept: int) -> list[Any]:
    told: list[Any] = [None]
    for row_V, token in zip(server.rows(ids)[:-1], ids[1:], strict=True):
        order = row_V.argsort(descending=True, stable=True).tolist()
        shown = order[:num_kept]
        if server.own == "always" and token not in shown:
            shown = [token, *shown]
        told.append(
            {
                str(each): {
                    "logprob": max(float(row_V[each]), -9999.0),  # as vLLM writes -inf
                    "rank": order.index(each) + 1,
                    "decoded_token": server.text(each),
                }
                for each in shown
            }
        )
    return told


def generated(server: LogprobServer, body: Any) -> list[Any]:
    """An answer of SGLang's /generate to several documents."""
    answers = []
    for ids, start in zip(body["input_ids"], body["logprob_start_len"], strict=True):
        rows_TV, own, rows = server.rows(ids), [[None, ids[start], server.text(ids[start])]], [None]
        for place in range(start, len(ids) - 1):
            kept = rows_TV[place].topk(body["top_logprobs_num"])
            own.append([float(rows_TV[place, ids[place + 1]]), ids[place + 1], server.text(ids[place + 1])])
            rows.append(
                [
                    [value, token, server.text(token)]
                    for value, token in zip(kept.values.tolist(), kept.indices.tolist(), strict=True)
                ]
            )
        told = {"id": "x", "prompt_tokens": len(ids), "input_token_logprobs": own, "input_top_logprobs": rows}
        answers.append({"text": "", "meta_info": told})
    return answers


@contextlib.contextmanager
def serving(logits_of: Callable[[Sequence[int]], Tensor], **options: Any) -> Iterator[LogprobServer]:
    """A running server."""
    with LogprobServer(logits_of, **options) as running:
        running.answer = answer  # type: ignore[attr-defined]
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()
