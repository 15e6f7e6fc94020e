"""Where a sweep's study is kept: a journal file or Redis, a database, another process or memory, by configs' names.

Imports Optuna when a storage is opened, and nothing of it before: every command loads this module's neighbours.
"""

import asyncio
import fcntl
import os
import random
import re
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from research.errors import ConfigError
from research.results.record import is_secret
from research.schemas import nearest
from research.sweeps.storage_locks import file_lock, postgres_lock, redis_lock

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

STORAGES = ("journal", "journal_redis", "rdb", "grpc", "memory")
REDIS_URLS = ("redis://", "rediss://", "unix://")
MAKING_TABLES = 10  # attempts of a command that meets others at the making of a database's tables
_IN_MEMORY: dict[str, Any] = {}
_LOCKS = threading.local()  # what this thread has locked


@dataclass(frozen=True)
class StorageSpec:
    """Where a study is kept, small enough to travel to a worker on another machine.

    name   journal: an append-only file at `path`; journal_redis: the same in the Redis server at `url`, under keys that
           begin with `prefix`; rdb: a database at `url`; grpc: Optuna's proxy at host and port; memory: this process
    """

    name: str
    path: str | None = None
    url: str | None = None
    host: str = "localhost"
    port: int = 13000
    engine: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""

    def open(self) -> "BaseStorage":
        """The storage, opened. Raises ConfigError where it cannot be reached or written."""
        kinds = {
            "journal": self._journal, "journal_redis": self._redis, "rdb": self._rdb, "grpc": self._grpc,
            "memory": self._memory,
        }  # fmt: skip
        return kinds[self.name]()

    @contextmanager
    def exclusively(self, study: str) -> Iterator[None]:
        """Inside, no other process that asks here changes a trial's state, or draws or adds what hangs on the others.

        A lock beside a journal or an SQLite file, or of the study in PostgreSQL or Redis; inside itself it is nothing.
        Other databases and gRPC offer none: there Optuna's own compare-and-swap guards the taking of a trial, and the
        rest by chance alone.
        """
        key, lock = self._lock(study)
        held: set[str] = _LOCKS.__dict__.setdefault("held", set())
        if lock is None or key in held:
            yield
            return
        with lock:
            held.add(key)
            try:
                yield
            finally:
                held.discard(key)

    def _lock(self, study: str) -> tuple[str, AbstractContextManager[None] | None]:
        """What the lock is known by in this process, and the lock; None where there is none."""
        url, file = os.path.expandvars(self.url or ""), ""
        if self.name == "journal":  # Optuna's own lock of the journal is another file: it is taken inside
            file = f"{self.path}.exclusive.lock"
        elif self.name == "rdb" and url.startswith("sqlite") and urlsplit(url).path.strip("/"):
            file = urlsplit(url).path.removeprefix("/") + ".lock"
        if file:
            return file, file_lock(Path(file))
        if self.name == "journal_redis":
            return f"{url} {study}", redis_lock(url, f"{self.prefix}:exclusive:{study}")
        if self.name == "rdb" and url.startswith("postgresql"):
            return f"{url} {study}", postgres_lock(url, self.engine, f"sweep {study}")
        return "", None

    def described(self) -> str:
        """The storage in a few words, passwords left out."""
        if self.name == "grpc":
            return f"grpc://{self.host}:{self.port}"
        url = _without_password(self.url or "")
        return str({"journal": self.path, "rdb": url, "journal_redis": url}.get(self.name, "memory"))

    def _journal(self) -> "BaseStorage":
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        path = Path(str(self.path))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            lock = FlockOnFile(path.with_name(path.name + ".lock"))
            lock.mend(path)
            return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]  # a lock by its form
        except OSError as error:
            raise ConfigError(
                f"the sweep's journal {path} cannot be written: {error.strerror}; choose another sweep folder "
                "(hydra.sweep.dir) or hydra.sweeper.storage.path"
            ) from None
        except ValueError as error:
            raise ConfigError(
                f"{path} is no journal of Optuna ({error}); give another hydra.sweeper.storage.path"
            ) from None

    def _redis(self) -> "BaseStorage":
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalRedisBackend

        try:
            import redis
        except ImportError as error:
            raise missing_package("storage journal_redis", error) from None
        url = os.path.expandvars(self.url or "")
        try:
            with redis.Redis.from_url(url, socket_connect_timeout=10) as client:
                client.ping()
            with experimental():
                return JournalStorage(JournalRedisBackend(url, prefix=self.prefix))
        except (redis.exceptions.RedisError, ValueError) as error:
            raise ConfigError(
                f"the Redis server {self.described()} cannot be used: {error}; give hydra.sweeper.storage.url such as "
                "redis://host:6379/0, and a password as the name of an environment variable: redis://:$NAME@host:6379/0"
            ) from None

    def _rdb(self) -> "BaseStorage":
        from optuna.storages import RDBStorage, get_storage

        url = os.path.expandvars(self.url or "")
        left = MAKING_TABLES
        while True:
            try:
                return get_storage(RDBStorage(url, engine_kwargs=dict(self.engine) or None))
            except Exception as error:
                left -= 1
                if left and re.search("already exists|duplicate key", str(error)):
                    time.sleep(random.uniform(0.1, 0.5))  # others are making the same tables at this moment
                    continue
                told = " ".join(str(error).splitlines()[0].split()) if str(error) else type(error).__name__
                raise ConfigError(
                    f"the storage {self.described()} cannot be used: {told}. A database needs its driver "
                    "(PostgreSQL: pip install 'psycopg[binary]'), a URL such as postgresql+psycopg://user@host/name, "
                    "and its password in PGPASSWORD or ~/.pgpass"
                ) from None

    def _grpc(self) -> "BaseStorage":
        from optuna.storages import GrpcStorageProxy

        try:
            asyncio.run(asyncio.wait_for(_connect(self.host, self.port), timeout=10))
        except (OSError, TimeoutError) as error:
            raise ConfigError(
                f"no gRPC proxy answers at {self.host}:{self.port} ({error}); start one with "
                "optuna.storages.run_grpc_proxy_server(storage, host=..., port=...)"
            ) from None
        return GrpcStorageProxy(host=self.host, port=self.port)

    def _memory(self) -> "BaseStorage":
        from optuna.storages import InMemoryStorage

        key = str(self.path)  # names the process that made it
        if key != f"memory of process {os.getpid()}":
            raise ConfigError(
                "hydra/sweeper/study_storage=memory lives in one process, and this launcher starts others; "
                "choose journal"
            )
        return _IN_MEMORY.setdefault(key, InMemoryStorage())


async def _connect(host: str, port: int) -> None:
    """Connect and hang up. Raises OSError where nothing listens there."""
    _, writer = await asyncio.open_connection(host, port)
    writer.close()


class FlockOnFile:
    """A lock for Optuna's journal that the system releases when its owner dies, by whatever means."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: Any = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        held = self._path.open("w")
        fcntl.flock(held, fcntl.LOCK_EX)
        self._held = held
        return True

    def release(self) -> None:
        """Let the next one in."""
        self._held.close()
        self._held = None

    def mend(self, journal: Path) -> None:
        """Cut off a last line without an end, as a loss of power may leave one; Optuna would refuse the file."""
        self.acquire()
        try:
            with journal.open("rb+") as file:
                text = file.read()
                if text and not text.endswith(b"\n"):
                    file.truncate(text.rfind(b"\n") + 1)
        finally:
            self.release()


def storage_spec(node: Mapping[str, Any], sweep_dir: Path) -> StorageSpec:
    """The storage that a config names. Raises ConfigError for a name, a key or a URL that cannot be used."""
    given = {str(key): value for key, value in node.items()}
    name = one_of(given.pop("name", None), STORAGES, "storage")
    known = {
        "journal": {"path"}, "journal_redis": {"url", "prefix"}, "rdb": {"url", "engine"}, "grpc": {"host", "port"},
        "memory": set(),
    }[name]  # fmt: skip
    for key in given.keys() - known:
        raise ConfigError(
            f"hydra.sweeper.storage.{key} is no key of storage {name}; its keys: {', '.join(sorted(known))}"
        )
    if name == "journal":
        return StorageSpec(name, path=str(Path(given.get("path") or sweep_dir / "study.journal").absolute()))
    if name == "memory":
        return StorageSpec(name, path=f"memory of process {os.getpid()}")
    if name == "grpc":
        return StorageSpec(name, host=given.get("host") or "localhost", port=int(given.get("port") or 13000))
    url = str(given.get("url") or "")
    _check_url(name, url)
    if name == "journal_redis":
        return StorageSpec(name, url=url, prefix=str(given.get("prefix") or ""))
    return StorageSpec(name, url=_with_whole_path(url), engine=dict(given.get("engine") or {}))


def _check_url(name: str, url: str) -> None:
    """Raise ConfigError for none, one that holds a password, or one that is no Redis server's."""
    example = "redis://host:6379/0" if name == "journal_redis" else "sqlite:///sweep.db"
    if not url:
        raise ConfigError(f"hydra/sweeper/study_storage={name} needs hydra.sweeper.storage.url, such as {example}")
    parts = urlsplit(url)
    in_query = [value for key, value in parse_qsl(parts.query) if is_secret(key)]
    if any(secret and not secret.startswith("$") for secret in (parts.password, *in_query)):
        raise ConfigError(
            "hydra.sweeper.storage.url holds a password, and configs are written to disk; give it in PGPASSWORD or "
            f"~/.pgpass, or as the name of an environment variable: {parts.scheme}://user:$NAME@host"
        )
    if name == "journal_redis" and not url.startswith(REDIS_URLS):
        raise ConfigError(
            f"hydra.sweeper.storage.url is {_without_password(url)}; storage journal_redis expects one that begins "
            f"with {', '.join(REDIS_URLS)}"
        )


@contextmanager
def experimental() -> Iterator[None]:
    """Without Optuna's warnings that a setting may change: settings are written out, and the version is recorded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def one_of(name: Any, valid: Any, kind: str) -> str:
    if name not in valid:
        told = nearest(str(name), valid)
        raise ConfigError(f"hydra.sweeper.{kind}.name is {name!r}{told}; expected one of {', '.join(valid)}")
    return str(name)


def missing_package(where: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"{where} needs a package that is not installed ({error}); pip install 'research-distillation[sweep]'"
    )


def _with_whole_path(url: str) -> str:
    """The URL of an SQLite file with its absolute path: a run may have another working folder."""
    head, mark, file = url.partition(":///")
    if not head.startswith("sqlite") or file.startswith(("$", "file:")):
        return url
    if not mark or file.partition("?")[0] in ("", ":memory:"):
        raise ConfigError(
            f"{url} is SQLite in memory, which one connection alone sees; give hydra/sweeper/study_storage=memory"
        )
    return f"{head}:///{Path(file).absolute()}"


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@") if parts.password else url
