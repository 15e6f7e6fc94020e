"""`distill traces`: from a teacher's folder to a store, killed and gone on with, and every refusal a user can meet."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from research.errors import StoreError
from research.models.build import build_network, describe
from research.models.weights import save_network, save_tokenizer
from research.results.record import RunRecord, read_record
from research.seeding import seed_for
from research.tasks.arithmetic import ChainedSums
from research.text.codec import Codec
from research.text.templates import Plain
from research.text.tokenizer import build_tokenizer, tokenizer_sha256
from research.traces.journal import JOURNAL_FILE
from research.traces.reading import read_traces
from research.traces.rows import StoredTrace
from research.traces.store import TraceStore

Distill = Callable[..., Any]


def save_teacher(folder: Path) -> None:
    """A language model of the sums' characters that was never trained: it writes noise, which is text all the same."""
    alphabet = str(ChainedSums().alphabet) + Plain.alphabet
    codec = Codec(build_tokenizer("characters", alphabet=alphabet), Plain())
    facts: dict[str, Any] = {
        "vocab_size": codec.vocab_size,
        "eos_token_id": codec.eos_ids[0],
        "pad_token_id": codec.pad_id,
        "tokenizer_sha256": tokenizer_sha256(codec.tokenizer),
    }
    description = {
        "_target_": "research.models.language.LanguageModel", "architecture": "llama", "hidden_size": 32,
        "num_layers": 1, "num_heads": 2, "max_positions": 64,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed_for(0, "teacher"))
        network = build_network(description, **facts)
    save_network(folder / "student", network, describe(description, **facts))
    save_tokenizer(folder / "student", codec.tokenizer)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(folder)
    return folder


@pytest.fixture
def written(teacher: Path) -> tuple[str, ...]:
    """A small run of that teacher; what it writes is all kept where it has an answer."""
    return (
        "traces", "task=sum5", "template=plain", f"teacher.path='{teacher}'", "data.num_problems=60", "filter=none",
        "sampling.num_samples=2", "sampling.max_new_tokens=12", "block_problems=16", "generator.batch_rows=4",
        "threads=1",
    )  # fmt: skip


def rows_in(folder: Path) -> list[StoredTrace]:
    return list(TraceStore(folder).rows())


def record_of(folder: Path) -> RunRecord:
    return read_record(folder / "run.json")


# -- a teacher writes -------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_gives_the_rows_of_one_that_was_not(
    written: tuple[str, ...], begin: Callable[..., Any], distill: Distill, tmp_path: Path
) -> None:
    whole = distill(*written, "store=whole", cwd=tmp_path)
    assert whole.code == 0, whole.err
    journal, shards = tmp_path / "cut" / "pending.jsonl", tmp_path / "cut" / "data"

    def amid_a_shard() -> bool:
        lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
        return len(list(shards.glob("shard-*"))) >= 1 and lines > 2

    begin(*written, "store=cut", cwd=tmp_path).kill_when(amid_a_shard)
    assert 1 <= len(list(shards.glob("shard-*"))) < 4
    with pytest.raises(StoreError, match="is not finished"):
        read_traces(tmp_path / "cut")
    resumed = distill(*written, "store=cut", cwd=tmp_path)
    assert resumed.code == 0 and resumed.out.replace(" cut", " whole").replace("cut/", "whole/") == whole.out
    assert rows_in(tmp_path / "cut") == rows_in(tmp_path / "whole") and len(rows_in(tmp_path / "whole")) == 120
    assert record_of(tmp_path / "cut").metrics == record_of(tmp_path / "whole").metrics


def test_a_run_leaves_store_record_tokenizer_and_page(
    written: tuple[str, ...], distill: Distill, tmp_path: Path, teacher: Path
) -> None:
    done = distill(*written, "store=store", "data.num_problems=20", cwd=tmp_path)
    assert done.code == 0 and done.err == "" and "20 problems, in store" in done.out
    record, rows = record_of(tmp_path / "store"), rows_in(tmp_path / "store")
    metrics = {name.partition("/")[2]: value for name, value in record.metrics.items()}
    assert (record.command, record.status, metrics["written"], metrics["problems"]) == (
        "distill traces", "completed", 40, 20,
    )  # fmt: skip
    reasons = Counter(row.reason for row in rows)
    assert (
        metrics["kept"] == reasons[None]
        and metrics["kept"]
        + metrics["dropped_no_answer"]
        + metrics.get("dropped_truncated", 0)
        + metrics.get("dropped_empty_chain", 0)
        == 40
    )
    writing = record.ledger["teacher_scoring"]
    assert writing["tokens"] == metrics["tokens"] == sum(row.tokens or 0 for row in rows)
    assert writing["flops"] > 0 and writing["seconds"] > 0 and record.ledger["rollout"]["flops"] == 0
    assert record.teacher is not None and record.teacher["kind"] == "local" and record.teacher["source"] == str(teacher)
    assert (tmp_path / "store" / "tokenizer" / "tokenizer.json").exists()
    assert 'class="token"' in (tmp_path / "store" / "explorer.html").read_text()


def test_seeds_samples_and_batches(written: tuple[str, ...], distill: Distill, tmp_path: Path) -> None:
    """Another seed writes other text; another batch size writes the same."""
    few = (*written, "data.num_problems=8", "explorer=false")
    for name, change in (("a", "seed=0"), ("b", "generator.batch_rows=64"), ("c", "seed=1")):
        assert distill(*few, change, f"store={name}", cwd=tmp_path).code == 0
    a, b, c = ([row.text for row in rows_in(tmp_path / name)] for name in "abc")
    assert a == b != c and len(set(a)) > 10


def test_two_writers_and_other_settings_are_refused(written: tuple[str, ...], distill: Distill, tmp_path: Path) -> None:
    few = (*written, "data.num_problems=8", "store=store", "explorer=false")
    (tmp_path / "store").mkdir()
    with (tmp_path / "store" / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "writes into the store store" in distill(*few, cwd=tmp_path).error
    assert distill(*few, cwd=tmp_path).code == 0
    for change, told in (
        ("sampling.sampling_temperature=0.5", "sampling.temperature: the store has 1.0, the run 0.5"),
        ("filter=answer_key", "filters: the store has []"),
        ("seed=3", "seed: the store has 0, the run 3"),
        ("data.problem_seed=1", "problems_sha256"),
    ):
        assert told in distill(*few, change, cwd=tmp_path).error
    shard = tmp_path / "store" / "data" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-9] + b"tampering")
    assert "its sha256 differs from the manifest" in distill(*few, cwd=tmp_path).error


def test_a_teacher_is_asked_as_it_was_trained(
    written: tuple[str, ...], teacher: Path, distill: Distill, tmp_path: Path
) -> None:
    """P41: template and layout come from the teacher's own run; another template is refused, not fed to it."""
    own = tmp_path / "own"
    save_teacher(own)
    config = {"template": {"_target_": "research.text.templates.Plain"}, "data": {"trace_format": "answer_then_chain"}}
    (own / "run.json").write_text(json.dumps({"config": config}))
    few = ("traces", "task=sum5", f"teacher.path='{own}'", "data.num_problems=4", "filter=none", "explorer=false",
           "sampling.max_new_tokens=8", "store=store")  # fmt: skip
    assert distill(*few, cwd=tmp_path).code == 0
    settings = TraceStore(tmp_path / "store").manifest.settings
    assert settings["template"] == config["template"] and settings["trace_format"] == "answer_then_chain"
    assert "was trained with" in distill(*few, "template=think", cwd=tmp_path).error


# -- other sources ----------------------------------------------------------------------------------------------------


def test_error_channels_on_the_tasks_own_solutions(distill: Distill, tmp_path: Path) -> None:
    command = ("traces", "source=reference", "task=sum5", "template=plain", "data.num_problems=400", "explorer=false",
               "+corruption.compensating_pair=0.5", "+corruption.wrong_step=0.25")  # fmt: skip
    kept = {}
    for name in ("answer_key", "step_verifier"):
        assert distill(*command, f"filter={name}", f"store={name}", cwd=tmp_path).code == 0
        kept[name] = {
            key.removeprefix("traces/kept_outcome_"): value
            for key, value in record_of(tmp_path / name).metrics.items()
            if "kept_outcome" in key
        }
    assert set(kept["answer_key"]) == {"valid_right", "lucky_answer"} and kept["answer_key"]["lucky_answer"] > 150
    assert kept["step_verifier"] == {"valid_right": kept["answer_key"]["valid_right"]}
    assert len(read_traces(tmp_path / "step_verifier")) == kept["step_verifier"]["valid_right"]
    slipped = {name: record_of(tmp_path / name).metrics["traces/false_positives"] for name in kept}
    lucky = kept["answer_key"]["lucky_answer"] / sum(kept["answer_key"].values())
    assert slipped == {"answer_key": pytest.approx(lucky), "step_verifier": 0}
    assert record_of(tmp_path / "answer_key").ledger["teacher_scoring"]["flops"] == 0
    assert record_of(tmp_path / "answer_key").teacher is None


def test_p75_five_thousand_problems_are_five_thousand(distill: Distill, tmp_path: Path) -> None:
    command = ("traces", "source=reference", "task=sum5", "template=plain", "data.num_problems=5000", "explorer=false",
               "filter=none", "store=store", "block_problems=2048")  # fmt: skip
    assert distill(*command, cwd=tmp_path).code == 0
    metrics = record_of(tmp_path / "store").metrics
    assert metrics["traces/distinct_problems"] == metrics["traces/problems"] == 5000


def test_a_file_is_imported_and_its_bad_rows_are_listed(distill: Distill, tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "rationale": "It is.", "output": str(n)} for n in range(6)]
    (tmp_path / "in.jsonl").write_text("\n".join([*map(json.dumps, rows), "{", '{"question": "?"}']))
    command = ("traces", "source=file", "data.file=in.jsonl", "store=store")
    assert "answer_key, which judges by verdict; these traces have none" in distill(*command, cwd=tmp_path).error
    done = distill(*command, "filter=none", cwd=tmp_path)
    assert done.code == 0 and "6 of 8 traces kept" in done.out and "quarantine_not_json" in done.out
    aside = [json.loads(line) for line in (tmp_path / "store" / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in aside] == [(7, "not_json"), (8, "no_answer")]
    assert [trace.answer for trace in read_traces(tmp_path / "store")] == list("012345")
    (tmp_path / "bare.json").write_text(json.dumps([{"instruction": "1+1", "output": "2"}] * 2))
    bare = ("traces", "source=file", "data.file=bare.json", "filter=none", "store=bare")
    error = distill(*bare, cwd=tmp_path).error
    assert "none of the 2 rows of bare.json is a trace (2 empty_chain, which bare/quarantine.jsonl lists" in error
    assert (
        "data.allow_empty_chain=true takes rows with an answer alone" in error and not (tmp_path / "bare/data").exists()
    )
    assert distill(*bare, "data.allow_empty_chain=true", cwd=tmp_path).code == 0
    (tmp_path / "in.jsonl").write_text(json.dumps(rows[0]))
    assert "file.sha256: the store has" in distill(*command, "filter=none", cwd=tmp_path).error


@pytest.mark.parametrize("filters", ["answer_key", "step_verifier"])
def test_what_slips_through_in_real_traces_is_what_was_committed(
    filters: str, distill: Distill, require_data: Callable[..., Path], repository: Path, tmp_path: Path
) -> None:
    """PaLM-540B on SVAMP: 41 of 705 checked right answers have a wrong or an unused chain; 21 of 685 after steps."""
    require_data("traces")
    chain = {"answer_key": "[answer_key]", "step_verifier": "[answer_key,step_verifier]"}[filters]
    command = ("traces", "source=released", "data.file=svamp_palm540b", "data.split=all", f"filters={chain}")
    done = distill(*command, "store=store", "explorer=false", "threads=1", cwd=tmp_path)
    assert done.code == 0, done.err
    record = record_of(tmp_path / "store")
    assert record.metrics == read_record(repository / "experiments" / "wrong_steps_real" / f"{filters}.json").metrics
    kept = Counter(row.trace.details["outcome"] for row in rows_in(tmp_path / "store") if row.kept)
    slipped = kept["lucky_answer"] + kept["unused_chain"]
    assert (slipped, kept["valid_right"]) == ({"answer_key": 41, "step_verifier": 21}[filters], 664)
    assert record.metrics["traces/false_positives"] == pytest.approx(slipped / (slipped + 664))
    assert record.metrics["traces/written"] == 1000 == record.metrics["traces/distinct_problems"]
    assert record.ledger["teacher_scoring"] == {"flops": 0.0, "tokens": 0.0, "seconds": 0.0}


# -- a server ---------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server that answers `healthy` prompts and is broken from then on."""

    daemon_threads = True

    def __init__(self, healthy: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.healthy, self.asked, self.lock = healthy, Counter[str](), threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        self.server_close()

    @property
    def overrides(self) -> tuple[str, ...]:
        address = f"http://127.0.0.1:{self.server_address[1]}/v1"
        return ("generator=server", f"generator.base_url={address}", "generator.model=m", "generator.concurrency=2",
                "generator.max_retries=1", "generator.backoff_s=0.01")  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """Solves `a+b-c..=` with its chain, the same every time."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            broken = sum(self.server.asked.values()) >= self.server.healthy
            self.server.asked[body["prompt"]] += not broken
        terms = [int(term) for term in body["prompt"].rstrip("=").replace("-", "+-").split("+") if term]
        totals = [f"{sum(terms[: n + 1]):02d}" for n in range(1, len(terms))]
        choices = [{"index": n, "text": f"{';'.join(totals)}#{totals[-1]}", "finish_reason": "stop"} for n in range(2)]
        usage = {"prompt_tokens": 15, "completion_tokens": 30}
        content = json.dumps({"choices": choices[: body.get("n", 1)], "usage": usage}).encode()
        self.send_response(500 if broken else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def served() -> Iterator[Callable[[int], Server]]:
    servers: list[Server] = []

    def serve(healthy: int) -> Server:
        servers.append(Server(healthy))
        return servers[-1]

    yield serve
    for server in servers:
        server.__exit__()


def test_a_server_that_dies_loses_and_doubles_nothing(
    served: Callable[[int], Server], distill: Distill, tmp_path: Path
) -> None:
    """What it had answered is kept, the rest is asked of the next one, which stands somewhere else."""
    command = ("traces", "task=sum5", "template=plain", "data.num_problems=24", "block_problems=8",
               "sampling.num_samples=2", "filter=step_verifier", "store=store")  # fmt: skip
    first, second = served(13), served(1000)
    assert "gave no usable answer" in distill(*command, *first.overrides, cwd=tmp_path).error
    done = distill(*command, *second.overrides, cwd=tmp_path)
    assert done.code == 0, done.err
    asked = first.asked + second.asked
    assert sum(first.asked.values()) == 13 and len(asked) == 24 and set(asked.values()) == {1}
    rows = rows_in(tmp_path / "store")
    assert [(row.trace.index, row.trace.sample) for row in rows] == [(n, s) for n in range(24) for s in (0, 1)]
    assert {row.reason for row in rows if row.trace.sample == 0} == {None}
    assert {row.reason for row in rows if row.trace.sample == 1} == {"duplicates"}
    record = record_of(tmp_path / "store")
    writing = record.ledger["teacher_scoring"]
    assert (writing["flops"], writing["tokens"]) == (None, 24 * 30), "as the server counts them"
    assert record.teacher is not None and record.teacher["events"] == {"requests": 11, "equal samples": 11}
    assert record.teacher["base_url"].endswith(f":{second.server_address[1]}/v1")


# -- a real server ----------------------------------------------------------------------------------------------------


class TransformersServe:
    """`transformers serve` over a teacher's folder, a process of its own that can be killed and started again."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self._model, self._log, self._process = model, log, None  # type: ignore[var-annotated]

    def start(self) -> None:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(self._model), "--device", "cpu"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)], stdout=log, stderr=log, env=environment
            )
        deadline = time.monotonic() + 180
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.2)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200)
        except OSError:
            return False

    @property
    def overrides(self) -> tuple[str, ...]:
        """Seeds hold at one request at a time."""
        return (
            "generator=server", f"generator.base_url=http://127.0.0.1:{self.port}/v1",
            f"generator.model='{self._model}'", "generator.choices_per_request=1", "generator.concurrency=1",
            "generator.backoff_s=0.05", "generator.max_retries=2",
            "+generator.extra_body.generation_config='{\"do_sample\": true}'",
        )  # fmt: skip


@pytest.fixture
def real_server(teacher: Path, tmp_path: Path) -> Iterator[TransformersServe]:
    pytest.importorskip("openai", reason="`transformers serve` needs the packages of transformers[serving]")
    server = TransformersServe(teacher / "student", tmp_path / "server.log")
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_a_real_server_that_is_killed_loses_and_doubles_nothing(
    real_server: TransformersServe, distill: Distill, tmp_path: Path
) -> None:
    """SIGKILL in the midst of the second shard: one line that says what to do, and the same command goes on later."""
    command = (
        "traces", "task=sum5", "template=plain", "data.num_problems=24", "block_problems=8", "filter=none",
        "sampling.num_samples=2", "sampling.max_new_tokens=8", *real_server.overrides,
    )  # fmt: skip
    whole = distill(*command, "store=whole", cwd=tmp_path)
    assert whole.code == 0, whole.err
    first_shard, journal = tmp_path / "cut" / "data" / "shard-00000.parquet", tmp_path / "cut" / JOURNAL_FILE

    def kill_it() -> None:
        while not first_shard.exists() or not journal.exists() or journal.read_bytes().count(b"\n") < 3:
            time.sleep(0.005)
        real_server.kill()

    killer = threading.Thread(target=kill_it, daemon=True)
    killer.start()
    error = distill(*command, "store=cut", cwd=tmp_path).error
    killer.join(60)
    assert f"http://127.0.0.1:{real_server.port}/v1/completions gave no usable answer in 3 attempts" in error
    assert "Look at the server, then run the same command again: it goes on with the others" in error
    left = list(TraceStore(tmp_path / "cut", require_complete=False).rows())
    expected = rows_in(tmp_path / "whole")
    assert left == expected[: len(left)] and 16 <= len(left) < 48, "the shards that are there are whole"
    with pytest.raises(StoreError, match="is not finished"):
        read_traces(tmp_path / "cut")
    assert "gave no usable answer" in distill(*command, "store=cut", cwd=tmp_path).error, "it is still down"
    real_server.start()
    done = distill(*command, "store=cut", cwd=tmp_path)
    assert done.code == 0, done.err
    rows = rows_in(tmp_path / "cut")
    assert [(row.trace.index, row.trace.sample) for row in rows] == [(n, s) for n in range(24) for s in (0, 1)]
    assert rows == expected and len({row.text for row in rows}) > 12
    cost = record_of(tmp_path / "cut").ledger["teacher_scoring"]
    assert cost["tokens"] == record_of(tmp_path / "whole").ledger["teacher_scoring"]["tokens"]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["task=sum5", "template=plain"], "teacher.path is not set"),
        (["teacher.path=nowhere"], "needs a task"),
        (["source=refrence"], "source is 'refrence'; nearest valid: reference"),
        (["source=reference", "task=sum5"], "template is not chosen"),
        (["source=file"], "source=file needs data.file"),
        (["source=released"], "source=released needs data.file, the name of a release (svamp_palm540b,"),
        (["source=released", "data.file=svamp", "filter=none"], "released traces 'svamp': give one of svamp_palm540b"),
        (["source=released", "data.file=svamp_palm540b", "task=svamp"], "and no task: it has its own"),
        (["source=file", "data.file=x.jsonl", "data.split=all"], "data.split is 'all'"),
        (["source=file", "data.file=none.jsonl", "filter=none"], "no file none.jsonl"),
        (["source=reference", "task=sum5", "template=plain", "filters=[anser_key]"], "nearest valid: answer_key"),
        (["source=reference", "task=sum5", "template=plain", "filters=[{name: length}]"], "judges by tokens"),
        (["source=reference", "task=sum5", "template=plain", "+corruption.wrong_steps=1"], "nearest valid: corruption"),
        (["source=reference", "task=addition", "template=plain", "+corruption.wrong_step=1"], "running totals"),
        (["source=reference", "task=sum5", "template=plain", "data.trace_format=chain"], "trace_format is 'chain'"),
        (["source=reference", "task=sum5", "template=plain", "data.split=training"], "data.split is 'training'"),
        (["source=reference", "task=sum5", "template=plain", "data.num_problems=null"], "give how many"),
        (["source=reference", "task=sum5", "template=plain", "filters=[contamination]"], "give how many"),
        (["source=reference", "task=sum5", "template=plain", "block_problems=0"], "block_problems is 0"),
        (["task=sum5", "template=plain", "generator=server", "generator.model=m"], "generator.base_url"),
        (["generator=server", "generator.api_key_env=NO_SUCH_KEY", "generator.base_url=http://127.0.0.1:1/v1",
          "generator.model=m", "task=sum5", "template=plain"], "NO_SUCH_KEY"),
        (["generator=sever"], "no generator 'sever'; nearest valid: server"),
        (["filter=answerkey"], "no filter 'answerkey'; nearest valid: answer_key"),
        (["sampling.tempreture=1"], "sampling.tempreture"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_in_one_line(
    overrides: list[str], told: str, distill: Distill, tmp_path: Path
) -> None:
    assert told in distill("traces", *overrides, cwd=tmp_path).error
    assert not list(tmp_path.rglob("shard-*"))


def test_sampling_without_meaning_is_refused(written: tuple[str, ...], distill: Distill, tmp_path: Path) -> None:
    for change in ("sampling.num_samples=0", "sampling.top_p=0", "sampling.max_new_tokens=null"):
        assert change.partition("=")[0] in distill(*written, change, "store=store", cwd=tmp_path).error


def test_a_teacher_that_is_not_there_is_named(distill: Callable[..., Any], tmp_path: Path) -> None:
    error = distill("traces", "task=sum8", "teacher.path=nowhere", cwd=tmp_path).error
    assert error == (
        "teacher.path is nowhere, which does not exist; give the folder of a finished run or of a Hugging Face model"
    )
