"""Locks across processes and machines, each kept where a study is: a file, a PostgreSQL or a Redis server.

What is done under one takes milliseconds. A lock is free again when its holder dies: at once, or, where a server hears
nothing of that (a machine without power, a Redis), after `LONGEST_S`.
"""

import fcntl
import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
LONGEST_S = 60.0
LOOKS_S = 0.01  # between two attempts to take a lock that a Redis keeps
_ENGINES: dict[str, Any] = {}


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock on a file, wherever `flock` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:  # its closing lets the next one in, whatever signal comes between
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def postgres_lock(url: str, engine: Mapping[str, Any], name: str) -> Iterator[None]:
    """Hold an advisory lock of a PostgreSQL database, for the length of a transaction on a connection of its own."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    if url not in _ENGINES:  # without a pool: a connection that waits idle would be one of the server's few
        settings = {key: value for key, value in engine.items() if not key.startswith("pool")}
        _ENGINES[url] = create_engine(url, **settings, poolclass=NullPool)
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
    with _ENGINES[url].connect() as connection:
        connection.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = {int(1000 * LONGEST_S)}"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        try:
            yield
        finally:
            try:
                connection.rollback()
            except SQLAlchemyError as error:  # what was done under it is done
                _told_of_loss(name, error)
                connection.invalidate()


@contextmanager
def redis_lock(url: str, name: str) -> Iterator[None]:
    """Hold a lock that is a key of a Redis server."""
    from redis import Redis
    from redis.exceptions import RedisError

    with Redis.from_url(url) as client:
        held = client.lock(name, timeout=LONGEST_S, sleep=LOOKS_S)
        held.acquire()
        try:
            yield
        finally:
            try:
                held.release()
            except RedisError as error:
                _told_of_loss(name, error)


def _told_of_loss(name: str, error: Exception) -> None:
    log.warning("the lock of %s was lost before it was given back: %s", name, str(error).partition("\n")[0])
