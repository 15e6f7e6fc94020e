"""A teacher behind a server: what it says must be what the same network says in this process, or an error."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.errors import ConfigError
from research.generation.client import ServerRefusal, ServerUnavailable
from research.losses.soft_target import soft_target
from research.models.build import build_network
from research.records import DenseLogits, TokenBatch, TopKLogprobs
from research.teachers.frozen import FrozenTeacher, LoadedNetwork
from research.teachers.served import ServedTeacher, tail_logprob
from research.teachers.top_k import keep_top_k
from research.text.document import Document, collate
from research.text.tokenizer import build_tokenizer

WIDTH = 24
FACTS: dict[str, Any] = {"vocab_size": WIDTH, "eos_token_id": 1, "pad_token_id": 0, "tokenizer_sha256": None}
LANGUAGE = {
    "_target_": "research.models.language.LanguageModel",
    "architecture": "llama",
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "initializer_range": 0.4,
}
QUICK: dict[str, Any] = {"backoff_s": 0.01, "max_wait_s": 0.2, "timeout_s": 5.0, "max_retries": 3}
PROTOCOLS = ("vllm", "sglang")
DIVERGENCES: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"teacher_mixture_weight": 0.3},
    "skewed_reverse_kl": {"skew_weight": 0.1},
    "total_variation": {},
}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network(LANGUAGE, **FACTS).eval()


@pytest.fixture(scope="module")
def frozen(network: nn.Module) -> FrozenTeacher:
    return FrozenTeacher(LoadedNetwork(network, None, WIDTH, "here"))


def logits_of(network: nn.Module, padding: int = 0) -> Callable[[Any], Tensor]:
    """The network as a server has it: one document, and a head with rows that no token has."""
    extra = torch.randn(padding, generator=torch.Generator().manual_seed(3)) + 1.0

    def logits(ids: Any) -> Tensor:
        ids_BT = torch.tensor([ids])
        logits_TV = network(ids_BT, torch.arange(len(ids))[None], torch.ones_like(ids_BT))[0]
        return torch.cat([logits_TV, extra.expand(len(ids), padding)], dim=-1)

    return logits


@pytest.fixture
def server(logprob_server: Any, network: nn.Module) -> Iterator[Any]:
    with logprob_server.serving(logits_of(network), max_logprobs=WIDTH) as running:
        yield running


def teacher_at(server: Any, **changes: Any) -> ServedTeacher:
    return ServedTeacher(server.base_url, "tiny", **{**FACTS, **QUICK, "top_k": 6, **changes})


def random_documents(count: int, seed: int = 0, longest: int = 14) -> list[Document]:
    draw = torch.Generator().manual_seed(seed)
    documents = []
    for index in range(count):
        length = int(torch.randint(2, longest + 1, (), generator=draw))
        prompt = int(torch.randint(1, length, (), generator=draw))
        documents.append(Document(tuple(torch.randint(0, WIDTH, (length,), generator=draw).tolist()), prompt, index))
    return documents


def batch_of(documents: list[Document], packed_to: int | None = None) -> TokenBatch:
    return collate(documents, prompt_loss_weight=0.0, pad_id=0, packed_to=packed_to)


def sparse(teacher: FrozenTeacher, batch: TokenBatch, top_k: int) -> TopKLogprobs:
    """The local teacher's signal at the places of the completions, cut to its K largest."""
    return keep_top_k(teacher.signal(batch).at(batch.completion_BT), top_k)


def assert_close(found: TopKLogprobs, expected: TopKLogprobs, tolerance: float = 1e-5) -> None:
    assert found.num_classes == expected.num_classes
    assert torch.equal(found.ids_NK, expected.ids_NK)
    torch.testing.assert_close(found.logprobs_NK, expected.logprobs_NK, atol=tolerance, rtol=0)
    torch.testing.assert_close(found.tail_logprob_N, expected.tail_logprob_N, atol=10 * tolerance, rtol=1e-4)


# -- the same signal as in this process -------------------------------------------------------------------------------


@pytest.mark.parametrize("packed_to", [None, 30])
@pytest.mark.parametrize("own", ["always", "never"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_p63_p22_the_served_signal_is_the_local_one(
    protocol: str, own: str, packed_to: int | None, server: Any, frozen: FrozenTeacher
) -> None:
    """K and K + 1 entries a row; documents that share a row never see each other."""
    server.own = own
    batch = batch_of(random_documents(9), packed_to)
    signal = teacher_at(server, protocol=protocol, documents_per_request=2).signal(batch)
    assert signal.ids_NK.shape == signal.logprobs_NK.shape == (*batch.ids_BT.shape, 6)
    assert signal.tail_logprob_N.shape == batch.ids_BT.shape and signal.ids_NK.dtype == torch.int64
    assert not signal.logprobs_NK.requires_grad and signal.logprobs_NK.dtype == torch.float32
    assert bool((signal.logprobs_NK.diff(dim=-1) <= 0).all())
    assert_close(signal.at(batch.completion_BT), sparse(frozen, batch, 6))
    if packed_to:
        assert int(batch.segment_BT.max()) > 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rows_that_are_masked_out_are_uniform(protocol: str, server: Any) -> None:
    batch = batch_of(random_documents(5))
    signal = teacher_at(server, protocol=protocol).signal(batch).at(~batch.completion_BT)
    assert torch.equal(signal.ids_NK, torch.arange(6).expand_as(signal.ids_NK))
    torch.testing.assert_close(signal.logprobs_NK.exp(), torch.full_like(signal.logprobs_NK, 1 / WIDTH))
    torch.testing.assert_close(signal.tail_logprob_N.exp(), torch.full_like(signal.tail_logprob_N, 18 / WIDTH))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_p63_value_and_gradient_of_the_loss_are_the_local_ones(
    protocol: str, name: str, temperature: float, server: Any, frozen: FrozenTeacher
) -> None:
    batch = batch_of(random_documents(6, seed=1))
    served = teacher_at(server, protocol=protocol).signal(batch)
    logits_BTV = torch.randn(*batch.ids_BT.shape, WIDTH, generator=torch.Generator().manual_seed(5))
    options: dict[str, Any] = {"divergence": name, "temperature": temperature, **DIVERGENCES[name]}
    one, two = logits_BTV.clone().requires_grad_(), logits_BTV.clone().requires_grad_()
    found = soft_target(one, served, loss_mask_N=batch.completion_BT, **options)
    expected = soft_target(two[batch.completion_BT], sparse(frozen, batch, 6), **options)
    found.total.backward()
    expected.total.backward()
    assert one.grad is not None and two.grad is not None and float(two.grad.norm()) > 0.1
    torch.testing.assert_close(found.total, expected.total, atol=0, rtol=1e-4)
    assert int(found.count) == int(expected.count) == int(batch.completion_BT.sum())
    torch.testing.assert_close(one.grad, two.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_with_every_token_kept_it_is_the_dense_teacher(protocol: str, server: Any, frozen: FrozenTeacher) -> None:
    """At any temperature then: no tail is left to guess."""
    batch = batch_of(random_documents(4, seed=2))
    mask_BT = batch.completion_BT
    served = teacher_at(server, protocol=protocol, top_k=WIDTH).signal(batch)
    assert bool(served.tail_logprob_N.isneginf().all())
    logits_BTV = torch.randn(*batch.ids_BT.shape, WIDTH, generator=torch.Generator().manual_seed(5))
    for temperature in (1.0, 4.0):
        found = soft_target(logits_BTV, served, temperature=temperature, loss_mask_N=mask_BT)
        expected = soft_target(logits_BTV, frozen.signal(batch), temperature=temperature, loss_mask_N=mask_BT)
        torch.testing.assert_close(found.total, expected.total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_first_and_last_places_can_be_asked_for(protocol: str, server: Any, network: nn.Module) -> None:
    """A completion without EOS may want the token after its own last one, and a prompt may be one token long."""
    ids_BT = torch.tensor([[5, 7, 9, 11], [3, 4, 0, 0], [8, 0, 0, 0]])
    segment_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    batch = TokenBatch(
        ids_BT, ids_BT, segment_BT.float(), segment_BT > 0, torch.arange(4).expand(3, 4) * segment_BT, segment_BT,
        torch.arange(3), 7.0, 7, 3,
    )  # fmt: skip
    signal = teacher_at(server, protocol=protocol).signal(batch)
    with torch.no_grad():
        dense = DenseLogits(network(*batch.network_inputs())).at(segment_BT > 0)
    assert_close(signal.at(segment_BT > 0), keep_top_k(dense, 6))


def test_a_batch_without_completions_asks_nothing(server: Any) -> None:
    batch = batch_of([Document((3, 4, 5), 3, 0)])
    assert not bool(batch.completion_BT.any())
    teacher_at(server).signal(batch)
    assert server.asked == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_p18_a_padded_head_is_cut_to_the_tokens(
    protocol: str, logprob_server: Any, network: nn.Module, frozen: FrozenTeacher
) -> None:
    """Where all of it is told, ids that no token has lose their mass to the others, as in a head that is cut."""
    batch = batch_of(random_documents(5, seed=4))
    for padding in (8, 136):
        padded = logits_of(network, padding)
        with logprob_server.serving(padded, max_logprobs=200) as server:
            options: dict[str, Any] = {"protocol": protocol, "top_k": 6}
            whole = teacher_at(server, **options, spare_k=WIDTH + padding - 6).signal(batch)
            assert int(whole.ids_NK.max()) < WIDTH
            expected = sparse(frozen, batch, 6)
            assert torch.equal(whole.at(batch.completion_BT).ids_NK, expected.ids_NK)
            torch.testing.assert_close(
                whole.at(batch.completion_BT).logprobs_NK, expected.logprobs_NK, atol=1e-4, rtol=0
            )
            with pytest.raises(ServerRefusal, match=r"a padded head.*teacher\.top_k=6\. Raise teacher\.spare_k"):
                teacher_at(server, **options).signal(batch)


# -- requests ---------------------------------------------------------------------------------------------------------


def documents_asked(server: Any) -> list[list[int]]:
    """Every list of ids that was sent."""
    found: list[list[int]] = []
    for path, body in server.asked:
        given = body["prompt"] if path == "/v1/completions" else body["input_ids"]
        found += given if isinstance(given[0], list) else [given]
    return found


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_p40_ids_are_sent_as_they_are_and_never_text(protocol: str, server: Any) -> None:
    documents = random_documents(500, longest=5)
    batch = batch_of(documents, packed_to=40)
    teacher_at(server, protocol=protocol, documents_per_request=50, top_k=2).signal(batch)
    sent = sorted(tuple(ids) for ids in documents_asked(server))
    assert sent == sorted(document.ids for document in documents if document.completion_ids)
    assert all(isinstance(token, int) for ids in sent for token in ids)
    assert not any("text" in body or "messages" in body for _, body in server.asked)


def test_what_a_request_says(server: Any) -> None:
    batch = batch_of([Document((3, 4, 5, 6), 2, 0), Document((7, 8), 1, 1)])
    teacher_at(server, extra_body={"repetition_penalty": 1.0}).signal(batch)
    teacher_at(server, protocol="sglang").signal(batch)
    teacher_at(server, documents_per_request=1, concurrency=1).signal(batch)
    vllm = {"model": "tiny", "prompt_logprobs": 6, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
    assert server.asked[0] == (
        "/v1/completions",
        {**vllm, "prompt": [[3, 4, 5, 6], [7, 8]], "repetition_penalty": 1.0},
    )
    assert server.asked[1] == (
        "/generate",
        {
            "input_ids": [[3, 4, 5, 6], [7, 8]],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": [1, 0],
            "top_logprobs_num": 6,
            "return_text_in_logprobs": True,
        },
    )
    assert server.asked[2:] == [("/v1/completions", {**vllm, "prompt": ids}) for ids in ([3, 4, 5, 6], [7, 8])]


def test_p29_requests_are_small_and_few_at_once(server: Any) -> None:
    teacher = teacher_at(server, documents_per_request=3, concurrency=2)
    teacher.signal(batch_of([Document((3, 4, 5), 1, number) for number in range(20)]))
    sizes = [len(body["prompt"]) for _, body in server.asked]
    assert sorted(sizes) == [2, *[3] * 6] and server.busiest <= 2
    assert teacher.events == {"requests": 7}


def test_the_key_is_sent_and_shown_nowhere(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_KEY", "sk-very-secret")
    teacher = teacher_at(server, api_key_env="TINY_KEY")
    teacher.signal(batch_of([Document((3, 4), 1, 0)]))
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    server.acts = [status(401, "Incorrect API key provided: sk-very-secret")]
    with pytest.raises(ServerRefusal, match=r"status 401.*key provided: \*\*\*") as raised:
        teacher.signal(batch_of([Document((3, 4), 1, 0)]))
    assert "secret" not in f"{raised.value} {teacher.identity} {teacher!r} {vars(teacher)}"


# -- a server that misbehaves -----------------------------------------------------------------------------------------


def status(code: int, words: str = "busy", **headers: str) -> Callable[..., None]:
    return lambda handler, _: handler.reply(code, words.encode(), **headers)


def half_a_json(handler: Any, _: Any) -> None:
    handler.reply(200, b'{"choices": [{"prompt_logprobs": [null, {"3": {"logp')


def cut_connection(handler: Any, _: Any) -> None:
    handler.reply(200, b'{"choices": [{"te', length=500)


def slow(handler: Any, _: Any) -> None:
    time.sleep(0.5)
    handler.reply(200, b"{}")


def changed(change: Callable[[list[Any]], Any]) -> Callable[..., None]:
    """The honest answer of vLLM, its rows of the first document changed."""

    def on(document: dict[str, Any]) -> dict[str, Any]:
        first = next(choice for choice in document["choices"] if choice["index"] == 0)
        first["prompt_logprobs"] = change(first["prompt_logprobs"])
        return document

    return lambda handler, body: handler.server.answer(handler, body, on)


def with_first(row: list[Any], change: Callable[[dict[str, Any]], Any]) -> list[Any]:
    return [row[0], change(dict(row[1])), *row[2:]]


def shifted(rows: list[Any]) -> list[Any]:
    return [None, *rows[2:], rows[1]]


BATCH = batch_of([Document((3, 4, 5, 6, 7), 1, 0), Document((8, 9, 10), 1, 1)])
FAULTS: dict[str, tuple[Callable[..., None], str]] = {
    "429": (status(429), "status 429"),
    "500": (status(500), "status 500"),
    "503": (status(503), "status 503"),
    "half a JSON": (half_a_json, "half a JSON"),
    "cut": (cut_connection, "connection"),
    "no choices": (lambda handler, _: handler.reply(200, b'{"choices": []}'), "no choices"),
    "one document too few": (
        lambda handler, body: handler.server.answer(handler, body, lambda d: {**d, "choices": d["choices"][:1]}),
        "logprobs",
    ),
    "one place too few": (changed(lambda rows: rows[:-1]), "logprobs"),
    "one place too many": (changed(lambda rows: [*rows, rows[-1]]), "logprobs"),
    "shifted by one": (changed(shifted), "logprobs"),
    "fewer entries": (changed(lambda rows: with_first(rows, lambda row: dict(list(row.items())[:3]))), "logprobs"),
    "a row is missing": (changed(lambda rows: [None, None, *rows[2:]]), "logprobs"),
    "not numbers": (changed(lambda rows: with_first(rows, lambda row: {k: {"logprob": "x"} for k in row})), "logprobs"),
    "nan": (changed(lambda rows: with_first(rows, lambda row: {k: {"logprob": math.nan} for k in row})), "logprobs"),
    "logits": (changed(lambda rows: with_first(rows, lambda row: {k: {"logprob": 3.0} for k in row})), "logprobs"),
    "no mass": (
        changed(lambda rows: with_first(rows, lambda row: {k: {"logprob": -9999.0} for k in row})),
        "logprobs",
    ),
    "too much mass": (
        changed(lambda rows: with_first(rows, lambda row: {k: {"logprob": -1.0} for k in row})),
        "logprobs",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_p63_p27_a_wrong_answer_is_asked_for_again_and_never_used(
    fault: str, server: Any, frozen: FrozenTeacher
) -> None:
    act, reason = FAULTS[fault]
    server.acts = [act, act]
    teacher = teacher_at(server)
    assert_close(teacher.signal(BATCH).at(BATCH.completion_BT), sparse(frozen, BATCH, 6))
    assert teacher.events == {"requests": 3, f"retry: {reason}": 2}
    server.acts = [act] * 20
    with pytest.raises(ServerUnavailable, match=r"the teacher tiny cannot be asked: .*no usable answer in 4 attempts"):
        teacher.signal(BATCH)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("one place too few", "prompt_logprobs of length 4 for 5 tokens"),
        ("shifted by one", r"do not hold the token \d that follows it: they are not aligned"),
        ("fewer entries", "3 logprobs at place 0 where 6 were asked for"),
        ("no mass", r"probabilities at place 0 that add up to 0"),
        ("too much mass", r"probabilities at place 0 that add up to 2\.\d+"),
        ("one document too few", "1 choices for 2 documents"),
    ],
)
def test_the_last_error_says_what_is_wrong(fault: str, told: str, server: Any) -> None:
    server.acts = [FAULTS[fault][0]] * 4
    server.own = "always"
    with pytest.raises(ServerUnavailable, match=told):
        teacher_at(server).signal(BATCH)


def sglang_fault(change: Callable[[dict[str, Any]], Any]) -> Callable[..., None]:
    def on(document: list[Any]) -> Any:
        change(document[0]["meta_info"])
        return document

    return lambda handler, body: handler.server.answer(handler, body, on)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda told: told["input_top_logprobs"].pop(), "of different lengths"),
        (lambda told: (told["input_top_logprobs"].pop(), told["input_token_logprobs"].pop()), "not the 5 sent"),
        (lambda told: told["input_token_logprobs"].reverse(), "not the 5 sent"),
        (lambda told: told["input_top_logprobs"][2].pop(), "5 logprobs at place 1 where 6 were asked for"),
        (lambda told: told["input_top_logprobs"].__setitem__(1, None), "in the place of a list"),
        (lambda told: told["input_top_logprobs"][1].__setitem__(0, [-1.0]), r"in the place of \[logprob, id, text\]"),
        (lambda told: told["input_top_logprobs"][1][0].__setitem__(1, -1), r"-1, .* in the place of"),
        (lambda told: told["input_top_logprobs"][1].__setitem__(0, [None, 3, "x"]), "no natural logs"),
    ],
)
def test_p63_a_wrong_answer_of_sglang_is_refused(change: Any, told: str, server: Any) -> None:
    server.acts = [sglang_fault(change)] * 4
    with pytest.raises(ServerUnavailable, match=told):
        teacher_at(server, protocol="sglang").signal(BATCH)


def test_a_slow_server_is_asked_again(server: Any) -> None:
    server.acts = [slow]
    teacher = teacher_at(server, timeout_s=0.2)
    teacher.signal(BATCH)
    assert teacher.events["retry: timeout"] == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_is_gone_is_named_with_what_to_do(protocol: str, logprob_server: Any, network: nn.Module) -> None:
    with logprob_server.serving(logits_of(network)) as server:
        teacher = teacher_at(server, protocol=protocol)
        teacher.signal(BATCH)
    told = r"the teacher tiny cannot be asked: http://127.*no usable answer in 4 attempts.*ckpt_path=last"
    with pytest.raises(ServerUnavailable, match=told):
        teacher.signal(BATCH)


def test_p22_more_than_the_server_s_limit_is_refused_with_the_limit(logprob_server: Any, network: nn.Module) -> None:
    with logprob_server.serving(logits_of(network), max_logprobs=5) as server:
        told = (
            r"teacher\.top_k asks for 6 logprobs, which the server refuses.*--max-logprobs.*greater than max allowed: 5"
        )
        with pytest.raises(ServerRefusal, match=told):
            teacher_at(server).signal(BATCH)
        assert len(server.asked) == 1, "asking again would not help"
        teacher_at(server, top_k=5).signal(BATCH)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"choices": [{"text": "a", "logprobs": {"top_logprobs": [None, {"a": -1.0}]}}]}, "no prompt_logprobs in its"),
        ({"choices": [{"prompt_logprobs": [None, {"the": {"logprob": -1.0}}]}]}, r"names tokens by text \(\['the'\]\)"),
    ],
)
def test_p40_a_server_that_speaks_of_text_is_refused_at_once(answer: Any, told: str, server: Any) -> None:
    """As llama-cpp-python's server does, and OpenAI's own `echo`: a text may stand for several ids."""
    server.acts = [lambda handler, _: handler.reply(200, json.dumps(answer).encode())]
    with pytest.raises(ServerRefusal, match=told):
        teacher_at(server).signal(batch_of([Document((3, 4), 1, 0)]))
    assert len(server.asked) == 1


def test_minus_infinity_of_vllm_is_probability_zero(server: Any) -> None:
    def sure(row: dict[str, Any]) -> dict[str, Any]:
        values = [0.0, *[-9999.0] * (len(row) - 1)]
        return {token: {"logprob": value} for token, value in zip(row, values, strict=True)}

    server.own = "never"
    server.acts = [changed(lambda rows: with_first(rows, sure))]
    signal = teacher_at(server).signal(BATCH)
    assert signal.logprobs_NK[0, 0].tolist() == [0.0, *[-math.inf] * 5]
    assert signal.tail_logprob_N[0, 0] == -math.inf, "nothing is likelier than what was kept"


# -- the tail ---------------------------------------------------------------------------------------------------------


def test_the_tail_is_the_log_of_what_is_left() -> None:
    for rest in (0.5, 1e-3, 1e-6):
        logprobs_NK = torch.log(torch.tensor([[(1 - rest) * 0.7, (1 - rest) * 0.3]], dtype=torch.float64))
        assert float(tail_logprob(logprobs_NK, 10_000)) == pytest.approx(math.log(rest), rel=1e-6)


def test_a_sum_that_rounding_carries_past_one_leaves_a_tail_that_is_finite() -> None:
    for excess in (0.0, 1e-9, 1e-3):
        logprobs_NK = torch.tensor([[math.log1p(excess), -30.0]], dtype=torch.float64)
        assert float(tail_logprob(logprobs_NK, 100)) == pytest.approx(math.log(98) - 30.0)
        assert float(tail_logprob(logprobs_NK, 10**9)) == pytest.approx(math.log(2.0**-24))


def test_the_tail_is_never_likelier_than_its_tokens_can_be() -> None:
    """1 - sum is rounding; ten tokens of at most e^-40 each are not."""
    logprobs_NK = torch.tensor([[-1e-7, -40.0]], dtype=torch.float64)
    assert float(tail_logprob(logprobs_NK, 12)) == pytest.approx(math.log(10) - 40)
    assert float(tail_logprob(logprobs_NK, 2)) == -math.inf


# -- who it is --------------------------------------------------------------------------------------------------------


def test_identity_is_of_the_model_and_not_of_the_call(server: Any) -> None:
    teacher, again = teacher_at(server), teacher_at(server)
    assert teacher.identity == again.identity, "a card names the time of the call"
    assert teacher.identity.kind == "served" and teacher.identity.source == server.base_url
    assert teacher.identity.details["card"] == {"id": "tiny", "owned_by": "tests", "max_model_len": 512}
    assert json.loads(json.dumps(teacher.identity.details)) == teacher.identity.details
    server.card = {**server.card, "root": "other/weights"}
    assert teacher_at(server).identity.sha256 != teacher.identity.sha256
    server.card = None
    assert teacher_at(server).identity.details["card"] == {}, "a server need not list its models"
    server.card = {"id": "small"}
    with pytest.raises(ConfigError, match=r"teacher\.model is 'tiny'; the server has small"):
        teacher_at(server).identity  # noqa: B018


def test_identity_of_a_server_that_is_gone() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        teacher = ServedTeacher(url, "tiny", **FACTS, **QUICK)  # building asks nothing
        with pytest.raises(ServerUnavailable, match="the teacher tiny cannot be asked"):
            teacher.identity  # noqa: B018


def test_flops_are_counted_where_the_size_is_known(server: Any) -> None:
    assert math.isnan(teacher_at(server).flops_of(BATCH)), "not known is not none"
    assert teacher_at(server, num_parameters=7e9).flops_of(BATCH) == 2 * 7e9 * 8
    with pytest.raises(TypeError, match="reads text"):
        teacher_at(server).flops_of(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pieces_are_what_the_server_says_that_ids_spell(protocol: str, server: Any) -> None:
    teacher = teacher_at(server, protocol=protocol)
    assert teacher.pieces([4, 5]) == {}
    server.spell = lambda token: f"<{token}>"
    assert teacher.pieces([4, 5, 4, 23]) == {4: "<4>", 5: "<5>", 23: "<23>"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"protocol": "openai"}, r"teacher\.protocol is 'openai'; expected one of vllm, sglang"),
        ({"top_k": WIDTH + 1}, rf"teacher\.top_k is {WIDTH + 1}; expected 1 to {WIDTH}"),
        ({"top_k": 0}, r"teacher\.top_k is 0"),
        ({"documents_per_request": 0}, r"documents_per_request is 0"),
        ({"spare_k": -1}, r"spare_k -1"),
        ({"concurrency": 0}, r"teacher\.concurrency is 0"),
        ({"extra_body": {"temperature": 2.0}}, r"teacher\.extra_body sets \['temperature'\]"),
        ({"base_url": "http://me:pw@host/v1"}, r"teacher\.base_url holds a user"),
        ({"base_url": None}, r"teacher\.base_url and teacher\.model are not both set"),
        ({"model": None}, r"teacher\.base_url and teacher\.model are not both set"),
    ],
)
def test_p22_wrong_arguments_are_refused_before_anything_is_sent(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ServedTeacher(**{"base_url": "http://127.0.0.1:1/v1", "model": "tiny", **FACTS, **changes})


def test_data_of_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="these data are classes"):
        ServedTeacher("http://127.0.0.1:1/v1", "tiny", input_shape=(64,), num_classes=10)


# -- a real server ----------------------------------------------------------------------------------------------------

VLLM_PYTHON = "RESEARCH_VLLM_PYTHON"


@pytest.fixture
def wide() -> nn.Module:
    """Heads as wide as the kernels of vLLM for CPUs ask for, and no place so sure that float32 loses its tail."""
    torch.manual_seed(0)
    return build_network({**LANGUAGE, "hidden_size": 64, "initializer_range": 0.2}, **FACTS).eval()


@pytest.fixture
def vllm(wide: nn.Module, tmp_path: Path) -> Iterator[str]:
    """Address of a vLLM over that network, started with the interpreter that the environment names."""
    python = os.environ.get(VLLM_PYTHON)
    if not python:
        pytest.skip(
            f"{VLLM_PYTHON} is not set: the interpreter of an environment with vLLM, see docs/served_teacher.md"
        )
    wide.model.save_pretrained(tmp_path / "model")
    build_tokenizer("characters", alphabet="0123456789+-=;#:abcde").save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"--model": tmp_path / "model", "--served-model-name": "tiny", "--host": "127.0.0.1", "--port": port}
    options |= {"--dtype": "float32", "--max-model-len": 64, "--max-logprobs": 20}
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            [*command, *(str(word) for pair in options.items() for word in pair)],
            stdout=log, stderr=log, env={**os.environ, **quiet, "HF_HUB_OFFLINE": "1"}, start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(running, f"http://127.0.0.1:{port}/health")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            stop(running)
            sys.stdout.write((tmp_path / "log").read_text()[-3000:])


def wait_for(running: "subprocess.Popen[bytes]", url: str) -> None:
    for _ in range(900):
        assert running.poll() is None, "the server ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(1)
    pytest.fail("the server did not come up")


def stop(running: "subprocess.Popen[bytes]") -> None:
    """The server and every process of its own, at last by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(timeout=20)


@pytest.mark.slow
def test_p63_a_real_vllm_says_what_the_local_teacher_says(vllm: str, wide: nn.Module) -> None:
    """Logprobs, tail and loss; its own limit of K; its own words for a token."""
    frozen = FrozenTeacher(LoadedNetwork(wide, None, WIDTH, "here"))
    batch = batch_of(random_documents(30, longest=40), packed_to=60)
    patient: dict[str, Any] = {"timeout_s": 60.0, "max_retries": 2}
    for top_k in (1, 8, 20):
        teacher = ServedTeacher(vllm, "tiny", top_k=top_k, **patient, **FACTS)
        signal, expected = teacher.signal(batch), sparse(frozen, batch, top_k)
        assert_close(signal.at(batch.completion_BT), expected, tolerance=1e-4)
        logits_BTV = torch.randn(*batch.ids_BT.shape, WIDTH, generator=torch.Generator().manual_seed(5))
        for divergence in ("forward_kl", "reverse_kl"):
            found = soft_target(logits_BTV, signal, divergence=divergence, loss_mask_N=batch.completion_BT).mean()
            local = soft_target(logits_BTV[batch.completion_BT], expected, divergence=divergence).mean()
            torch.testing.assert_close(found, local, atol=1e-4, rtol=1e-4)
    with pytest.raises(ServerRefusal, match=r"teacher\.top_k asks for 21 logprobs.*greater than max allowed: 20"):
        ServedTeacher(vllm, "tiny", top_k=21, **patient, **FACTS).signal(batch)
    assert teacher.identity.details["card"]["max_model_len"] == 64
    assert teacher.pieces([1, 2, 5]) == {1: "<eos>", 2: "#", 5: "."}
