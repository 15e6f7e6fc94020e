"""A hub that does not answer is found out at once, and a model in the local cache is still found."""

import logging
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from research.errors import CheckpointError, ConfigError
from research.models.pretrained_language import load_causal_model
from research.text.hub import hub_answers, source_of, why_unread
from research.text.tokenizer import build_tokenizer

NAME = "nobody/no-such-model"


class Nothing(BaseHTTPRequestHandler):
    """A hub that is there and has nothing."""

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's address is a port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = HTTPServer(("127.0.0.1", 0), Nothing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_that_answers_is_asked(reachable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_answers() and source_of(NAME) == NAME
    assert why_unread(NAME).endswith("could not be read from the Hugging Face Hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_answers()


def test_a_folder_and_the_cache_are_read_without_the_hub(
    unreachable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache as the hub's own library lays it out: a reference to a commit, and a snapshot of its files."""
    assert source_of(tmp_path) == str(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / f"models--{NAME.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    build_tokenizer("characters", alphabet="abc").save_pretrained(home / "snapshots" / ("0" * 40))
    assert source_of(NAME) == str(home / "snapshots" / ("0" * 40)) == source_of(NAME, "0" * 40)
    assert "c" in build_tokenizer(NAME).get_vocab()
    with pytest.raises(OSError, match="snapshot folder for the specified revision"):
        source_of(NAME, "1" * 40)


def test_a_hub_that_does_not_answer_is_told_at_once(unreachable: None, caplog: pytest.LogCaptureFixture) -> None:
    """Without the question beforehand each file is tried six times, in 53 seconds and two dozen lines."""
    cannot = "the Hugging Face Hub cannot be reached from here, and its local cache does not hold it"
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(ConfigError, match=f"neither 'characters' nor 'bpe'; it is no folder, {cannot}"):
            build_tokenizer(NAME)
        with pytest.raises(CheckpointError, match=rf"{NAME} is not a causal language model .*{cannot}"):
            load_causal_model(NAME)
    assert not [record for record in caplog.records if "Retry" in record.getMessage()]
