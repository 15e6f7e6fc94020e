"""The client against a real HTTP server on this machine that misbehaves on demand."""

import ast
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from research.errors import ConfigError
from research.generation.base import Prompt, Written
from research.generation.client import ServerRefusal, ServerUnavailable, retry_after_s
from research.generation.server import ServerGenerator
from research.records import Sampling

Honest = Callable[..., None]
PROMPTS = [Prompt(number, f"problem {number}", ()) for number in range(12)]
SAMPLED = Sampling(num_samples=3, temperature=0.7, top_p=0.9, max_new_tokens=40, seed=5)
QUICK: dict[str, Any] = {"backoff_s": 0.01, "max_wait_s": 0.5, "timeout_s": 5.0, "max_retries": 4}


def client(server: Any, **changes: Any) -> ServerGenerator:
    return ServerGenerator(server.base_url, "tiny", **{**QUICK, **changes})


def checked(results: list[Written], prompts: list[Prompt], samples: int = 3) -> dict[int, Written]:
    """Each prompt once, with its own texts, as many as asked for and all different."""
    assert sorted(result.index for result in results) == [prompt.index for prompt in prompts]
    for result in results:
        texts = [completion.text for completion in result.completions]
        assert len(set(texts)) == len(texts) == samples, texts
        assert all(text.startswith(f"problem {result.index}|") for text in texts)
    return {result.index: result for result in results}


def status(code: int, words: str = "busy", **headers: str) -> Callable[..., None]:
    return lambda handler, _: handler.reply(code, words.encode(), headers)


def half_a_json(handler: Any, _: Any) -> None:
    handler.reply(200, b'{"choices": [{"text": "the answer is 4')


def cut_connection(handler: Any, _: Any) -> None:
    handler.reply(200, b'{"choices": [{"te', length=500)


def hang_up(handler: Any, _: Any) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def no_choices(handler: Any, _: Any) -> None:
    handler.reply(200, b'{"error": {"message": "out of memory"}, "choices": []}')


def slow(handler: Any, _: Any) -> None:
    time.sleep(0.6)
    handler.reply(200, b"{}")


def dripping(handler: Any, _: Any) -> None:
    """A byte now and then: no single read ever times out."""
    handler.reply(200, b"{", length=500)
    for _ in range(12):
        time.sleep(0.05)
        handler.wfile.write(b" ")
        handler.wfile.flush()


def test_a_request_says_what_the_sampling_says(server: Any) -> None:
    generator = client(server, extra_body={"top_k": -1})
    results = checked(list(generator.generate(PROMPTS[:1], SAMPLED)), PROMPTS[:1])
    (asked,) = server.asked
    seed = asked.pop("seed")
    assert asked == {
        "model": "tiny", "prompt": "problem 0", "n": 3, "max_tokens": 40, "temperature": 0.7, "top_p": 0.9, "top_k": -1
    }  # fmt: skip
    assert 0 <= seed < 2**31
    completions = results[0].completions
    assert [each.text for each in completions] == [f"problem 0|{seed}|{number}" for number in range(3)], (
        "order of index"
    )
    assert [each.stop for each in completions] == ["eos", "length", "eos"]
    assert {(each.ids, each.logprob) for each in completions} == {((), None)}
    assert (generator.spent.prompt_tokens, generator.spent.tokens, generator.spent.flops) == (5, 21, None)
    assert generator.spent.seconds > 0
    assert generator.events == {"requests": 1}


def test_seeds_are_of_the_problem_and_not_of_the_order(server: Any) -> None:
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[4:6]):
        checked(list(client(server).generate(prompts, SAMPLED)), sorted(prompts, key=lambda prompt: prompt.index))
    seeds: dict[str, set[int]] = {}
    for asked in server.asked:
        seeds.setdefault(asked["prompt"], set()).add(asked["seed"])
    assert [len(given) for given in seeds.values()] == [1] * 12
    assert len(set.union(*seeds.values())) == 12
    list(client(server).generate(PROMPTS[:1], Sampling(3, 0.7, seed=6)))
    assert server.asked[-1]["seed"] not in set.union(*seeds.values())


def test_chat_sends_messages_and_keeps_reasoning(server: Any) -> None:
    def reasoned(handler: Any, _: Any) -> None:
        message = {"content": "4", "reasoning_content": "2 and 2"}
        choices = [
            {"index": 0, "message": message, "finish_reason": "stop"},
            {"index": 1, "message": {**message, "content": None}, "finish_reason": "length"},
        ]
        handler.reply(200, json.dumps({"choices": choices}).encode())

    generator = client(server, endpoint="chat", system_prompt="be brief")
    checked(list(generator.generate(PROMPTS[:2], SAMPLED)), PROMPTS[:2])
    system, user = server.asked[0]["messages"]
    assert system == {"role": "system", "content": "be brief"} and user["content"].startswith("problem ")
    server.acts = [reasoned]
    (written,) = generator.generate(PROMPTS[:1], Sampling(2, 0.7))
    assert [each.text for each in written.completions] == ["<think>2 and 2</think>4", "<think>2 and 2</think>"]
    assert generator.events["answers without usage"] == 1


def test_ids_are_taken_where_a_server_sends_them_and_other_endings_are_counted(server: Any) -> None:
    def with_ids(handler: Any, _: Any) -> None:
        choices = [
            {"text": "a", "finish_reason": "content_filter", "token_ids": [4, 2]},
            {"text": "b", "finish_reason": None, "token_ids": None},
        ]
        handler.reply(200, json.dumps({"choices": choices}).encode())

    server.acts = [with_ids]
    generator = client(server)
    (written,) = generator.generate(PROMPTS[:1], Sampling(2, 0.7))
    assert [(each.ids, each.stop) for each in written.completions] == [((4, 2), "length"), ((), "length")]
    assert generator.events["finish_reason content_filter"] == generator.events["finish_reason None"] == 1


def test_greedy_is_asked_for_once(server: Any) -> None:
    (written,) = client(server).generate(PROMPTS[:1], Sampling(num_samples=4))
    assert len(server.asked) == 1 and "n" not in server.asked[0] and server.asked[0]["temperature"] == 0.0
    assert len(written.completions) == 4 and len(set(written.completions)) == 1


# -- a server that misbehaves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (status(429), "status 429"),
        (status(500), "status 500"),
        (status(503), "status 503"),
        (half_a_json, "half a JSON"),
        (cut_connection, "connection"),
        (hang_up, "connection"),
        (no_choices, "no choices"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_asks_again_and_nothing_is_doubled_or_lost(act: Any, reason: str, server: Any, honest: Honest) -> None:
    server.acts = [act, honest, act, act, honest, act]
    generator = client(server, concurrency=3)
    checked(list(generator.generate(PROMPTS, SAMPLED)), PROMPTS)
    assert generator.events == {"requests": 16, f"retry: {reason}": 4}
    assert generator.spent.tokens == 12 * 21


@pytest.mark.parametrize("act", [slow, dripping])
def test_an_answer_that_takes_too_long_is_asked_for_again(act: Any, server: Any) -> None:
    server.acts = [act]
    generator = client(server, timeout_s=0.25)
    checked(list(generator.generate(PROMPTS[:1], SAMPLED)), PROMPTS[:1])
    assert generator.events["retry: timeout"] == 1


def test_fewer_choices_are_made_up_and_surplus_ones_are_dropped(server: Any, honest: Honest) -> None:
    server.acts = [lambda handler, body: honest(handler, body, 1)] * 2 + [
        lambda handler, body: honest(handler, body, 4)
    ]
    generator = client(server)
    results = checked(list(generator.generate(PROMPTS[:1], Sampling(5, 0.7))), PROMPTS[:1], samples=5)
    assert [asked.get("n", 1) for asked in server.asked] == [5, 4, 3]
    assert len({asked["seed"] for asked in server.asked}) == 3, "a seed asked for twice gives the same text twice"
    assert generator.events == {"requests": 3, "missing choices": 4 + 3, "surplus choices": 1}
    assert results[0].completions[0].text.endswith(f"|{server.asked[0]['seed']}|0")


def test_one_choice_a_request_for_servers_without_n(server: Any) -> None:
    generator = client(server, choices_per_request=1)
    checked(list(generator.generate(PROMPTS, SAMPLED)), PROMPTS)
    assert len(server.asked) == 36 and not any("n" in asked for asked in server.asked)
    assert generator.events == {"requests": 36}


def test_p60_a_server_that_does_not_sample_is_noticed(server: Any) -> None:
    def same(handler: Any, body: Any) -> None:
        choices = [{"text": "4", "finish_reason": "stop"}] * body["n"]
        handler.reply(200, json.dumps({"choices": choices}).encode())

    server.acts = [same]
    generator = client(server)
    list(generator.generate(PROMPTS[:2], SAMPLED))
    assert generator.events["equal samples"] == 1


def test_retry_after_is_a_lower_bound_of_the_wait(server: Any) -> None:
    server.acts = [status(429, **{"Retry-After": "0.3"})]
    started = time.monotonic()
    checked(list(client(server).generate(PROMPTS[:1], SAMPLED)), PROMPTS[:1])
    assert time.monotonic() - started >= 0.3
    server.acts = [status(429, **{"Retry-After": "3600"})]
    with pytest.raises(ServerUnavailable, match=r"asks to wait 3600 s, max_wait_s is 0\.5"):
        list(client(server).generate(PROMPTS[:1], SAMPLED))


def test_retry_after_is_read_as_seconds_or_date() -> None:
    in_a_minute = formatdate(time.time() + 60, usegmt=True)
    given = [{"retry-after": value} for value in ("7", "0.5", "-3", "soon", "", in_a_minute)]
    assert [round(retry_after_s(headers) / 5) * 5 for headers in given] == [5, 0, 0, 0, 0, 60]
    assert [retry_after_s(headers) for headers in given[:4]] == [7.0, 0.5, 0.0, 0.0]


def test_a_refusal_is_told_in_the_servers_words_and_not_repeated(server: Any) -> None:
    words = '{"error": {"message": "the model `tiny` does not exist"}}'
    server.acts = [status(404, words)] * 12
    with pytest.raises(ServerRefusal, match=r"status 404: .*the model `tiny` does not exist"):
        list(client(server, concurrency=1).generate(PROMPTS, SAMPLED))
    assert len(server.asked) == 1


def test_a_server_that_is_down_is_named_with_what_to_do() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        generator = ServerGenerator(url, "tiny", **{**QUICK, "max_retries": 2})
        told = rf"{url}/completions gave no usable answer in 3 attempts.*0 of 12 prompts.*run the same command again"
        with pytest.raises(ServerUnavailable, match=told):
            list(generator.generate(PROMPTS, SAMPLED))
    assert generator.events["retry: connection"] >= 2


def test_what_is_under_way_is_yielded_before_the_error(server: Any, honest: Honest) -> None:
    """One prompt is hopeless at once while the other's answer is still being written."""
    begun = threading.Event()

    def refused(handler: Any, body: Any) -> None:
        begun.wait(5)
        status(400, "too long")(handler, body)

    def late(handler: Any, body: Any) -> None:
        begun.set()
        time.sleep(0.2)
        honest(handler, body)

    server.acts = [refused, late]
    results = client(server, concurrency=2).generate(PROMPTS, SAMPLED)
    assert len(next(results).completions) == 3
    with pytest.raises(ServerRefusal, match="too long"):
        next(results)
    assert len(server.asked) == 2, "no new prompt after the first error"


def test_a_caller_that_stops_leaves_nothing_running(server: Any) -> None:
    released, ended = threading.Event(), []
    server.acts = [lambda handler, body: ended.append(released.wait(20))] * 3
    results = client(server, concurrency=4, timeout_s=60.0).generate(PROMPTS, SAMPLED)
    next(results)
    results.close()
    assert ended == [], "it waited for answers that nobody wants"
    assert not [thread for thread in threading.enumerate() if thread.name == "requests"]
    released.set()


def test_few_prompts_run_ahead_of_the_caller(server: Any) -> None:
    prompts = [Prompt(number, f"problem {number}", ()) for number in range(60)]
    results = client(server, concurrency=2).generate(prompts, Sampling())
    next(results)
    time.sleep(0.3)
    assert len(server.asked) <= 5, "at most twice the concurrency beyond what was taken"
    assert len(list(results)) == 59


def test_it_runs_inside_an_event_loop(server: Any) -> None:
    """As in a notebook."""

    async def cell() -> list[Written]:
        return list(client(server).generate(PROMPTS, SAMPLED))

    checked(asyncio.run(cell()), PROMPTS)


# -- a server that dies -----------------------------------------------------------------------------------------------

PROGRAM = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        time.sleep(0.02)
        rows = [{"text": f"{body['prompt']}|{body['seed']}|{n}", "finish_reason": "stop"} for n in range(body["n"])]
        payload = json.dumps({"choices": rows}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)
    def log_message(self, *_): pass
server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def process(port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(port)], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            yield running, int(running.stdout.readline())
        finally:
            running.kill()


def test_a_server_killed_and_started_again_loses_nothing() -> None:
    prompts = [Prompt(number, f"problem {number}", ()) for number in range(60)]
    with process() as (first, port):
        url = f"http://127.0.0.1:{port}/v1"
        generator = ServerGenerator(url, "tiny", **{**QUICK, "concurrency": 4, "max_retries": 40, "backoff_s": 0.05})
        results = generator.generate(prompts, SAMPLED)
        taken = [next(results) for _ in range(10)]
        first.send_signal(signal.SIGKILL)
        first.wait()
        with process(port):
            taken += list(results)
    checked(taken, prompts)
    assert generator.events["retry: connection"] > 0


def test_a_server_killed_for_good_leaves_what_was_finished() -> None:
    prompts = [Prompt(number, f"problem {number}", ()) for number in range(60)]
    taken: list[Written] = []
    with process() as (running, port):
        generator = ServerGenerator(f"http://127.0.0.1:{port}/v1", "tiny", **QUICK, concurrency=4)

        def consume() -> None:
            for result in generator.generate(prompts, SAMPLED):
                taken.append(result)
                if len(taken) == 10:
                    running.kill()

        with pytest.raises(ServerUnavailable, match=r"(\d+) of 60 prompts were finished") as raised:
            consume()
    assert f"{len(taken)} of 60" in str(raised.value)
    with process() as (_, port):
        done = {result.index for result in taken}
        again = ServerGenerator(f"http://127.0.0.1:{port}/v1", "tiny", **QUICK)
        taken += again.generate([prompt for prompt in prompts if prompt.index not in done], SAMPLED)
    checked(taken, prompts)


# -- keys and addresses -----------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_shown_nowhere(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_KEY", "sk-very-secret")
    generator = client(server, api_key_env="TINY_KEY")
    list(generator.generate(PROMPTS[:1], SAMPLED))
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    server.acts = [status(401, "Incorrect API key provided: sk-very-secret")]
    with pytest.raises(ServerRefusal) as raised:
        list(generator.generate(PROMPTS[:1], SAMPLED))
    shown = f"{raised.value} {generator.identity} {generator.events} {generator!r}"
    assert "secret" not in shown and "key provided: ***" in shown
    monkeypatch.delenv("TINY_KEY")
    with pytest.raises(ConfigError, match="TINY_KEY, which is not set"):
        client(server, api_key_env="TINY_KEY")


def test_a_proxy_of_the_environment_does_not_stand_before_this_machine(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    checked(list(client(server).generate(PROMPTS[:1], SAMPLED)), PROMPTS[:1])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"base_url": "file:///etc/passwd"}, "expected http or https"),
        ({"base_url": "127.0.0.1:8000/v1"}, "expected http or https"),
        ({"base_url": "http://127.0.0.1:port/v1"}, "expected http or https"),
        ({"base_url": "http://me:pw@host/v1"}, "holds a user, a password"),
        ({"base_url": "http://host/v1?key=pw"}, "holds a user, a password"),
        ({"endpoint": "responses"}, "endpoint is 'responses'"),
        ({"system_prompt": "hi"}, "endpoint=chat"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"choices_per_request": 0}, "choices_per_request is 0"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"extra_body": {"seed": 1, "top_k": 3}}, r"extra_body sets \['seed'\]"),
    ],
)
def test_p117_wrong_arguments_are_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        ServerGenerator(**{"base_url": "http://127.0.0.1:1/v1", "model": "tiny", **arguments})
    assert "pw" not in str(raised.value)


def test_p117_nothing_of_the_package_listens(repository: Path) -> None:
    servers = {
        "socket",
        "socketserver",
        "http.server",
        "wsgiref",
        "fastapi",
        "uvicorn",
        "flask",
        "aiohttp",
        "starlette",
    }
    for path in (repository / "research").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        named |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        calls = {
            node.func.attr for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert not named & servers and not calls & {"create_server", "start_server", "listen"}, path


def test_one_index_twice_is_refused(server: Any) -> None:
    with pytest.raises(ValueError, match="prompt 0 is given twice"):
        client(server).generate([PROMPTS[0], PROMPTS[0]], SAMPLED)
    assert list(client(server).generate([], SAMPLED)) == []


# -- a real server ----------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers_serve(language_model: Callable[..., Any], tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Address and model name of `transformers serve` over a tiny model with a character tokenizer."""
    pytest.importorskip("openai", reason="`transformers serve` needs the packages of transformers[serving]")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *"0123456789+=# abcdefghijklmnop"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(tmp_path / "model")
    language_model("llama").save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tmp_path / "model")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            stdout=log, stderr=log, env=environment,
        )  # fmt: skip
        try:
            yield f"http://127.0.0.1:{port}/v1", str(tmp_path / "model")
        finally:
            running.kill()
            running.wait()
            sys.stdout.write((tmp_path / "log").read_text()[-3000:])


@pytest.mark.slow
def test_transformers_serve_writes_what_the_local_model_writes(
    transformers_serve: tuple[str, str], language_model: Callable[..., Any]
) -> None:
    """The same greedy text as in process, and seeds that hold."""
    from transformers import AutoTokenizer

    from research.generation.in_process import LocalGenerator

    url, model = transformers_serve
    asked = {"timeout_s": 120.0, "max_retries": 12, "choices_per_request": 1, "concurrency": 1}
    generator = ServerGenerator(url, model, **asked, extra_body={"generation_config": '{"do_sample": true}'})
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = ["12+5=", "a", "33+14+7="]
    prompts = [Prompt(number, text, tuple(tokenizer(text).input_ids)) for number, text in enumerate(texts)]
    greedy = Sampling(max_new_tokens=12)
    local = {
        result.index: result for result in LocalGenerator(language_model("llama"), tokenizer).generate(prompts, greedy)
    }
    for result in generator.generate(prompts, greedy):
        (here,), (there,) = local[result.index].completions, result.completions
        assert (there.text, there.stop) == (here.text.replace("<pad>", ""), here.stop), "it leaves special tokens out"
    sampled = Sampling(6, 1.0, 1.0, 12, 0)
    one, two = ({result.index: result.completions for result in generator.generate(prompts, sampled)} for _ in range(2))
    assert one == two and all(len(set(each)) > 1 for each in one.values())
    assert {completion.stop for each in one.values() for completion in each} == {"eos", "length"}
