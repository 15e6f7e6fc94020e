"""How a server is reached: its address, its key, and how long and how often it is asked."""

import ipaddress
import os
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from research.errors import ConfigError
from research.generation.client import CompletionClient


@dataclass(frozen=True)
class Connection:
    """A server that speaks HTTP and JSON, as a generator or a teacher holds it.

    owner        what a config calls it ("generator", "teacher"): errors name the key
    base_url     http or https, without user, password, query or fragment
    api_key_env  name of the environment variable that holds the key; it is sent to the server and shown nowhere
    concurrency  requests under way at once
    timeout_s, max_retries, backoff_s, max_wait_s   see :class:`CompletionClient`
    fixed        fields of every request that the config gives; ``own`` names those that it must not

    Raises ConfigError for what no request could use.
    """

    owner: str
    base_url: str
    api_key_env: str | None = None
    concurrency: int = 8
    timeout_s: float = 600.0
    max_retries: int = 8
    backoff_s: float = 0.5
    max_wait_s: float = 60.0
    fixed: Mapping[str, Any] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    _key: str | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        _check_numbers(self.owner, self.concurrency, self.timeout_s, self.max_retries, self.backoff_s, self.max_wait_s)
        own = sorted(set(self.fixed) & set(self.own))
        if own:
            raise ConfigError(f"{self.owner}.extra_body sets {own}, which the {self.owner} itself sets; leave them out")
        object.__setattr__(self, "base_url", _checked_url(self.owner, self.base_url))
        object.__setattr__(self, "_key", _key(self.owner, self.api_key_env))

    @asynccontextmanager
    async def opened(self, url: str, events: Counter[str]) -> AsyncIterator[CompletionClient]:
        """A client of one of the server's addresses.

        Raises ConfigError where the HTTP library is not installed.
        """
        httpx2 = _http_library()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=self.concurrency)
        parts = urlsplit(url)
        # certificates take longer to load than a short answer takes to come, and plain http reads none
        options = {"trust_env": not _is_loopback(parts.hostname), "verify": parts.scheme == "https"}
        async with httpx2.AsyncClient(headers=headers, timeout=None, limits=limits, **options) as http:
            yield CompletionClient(
                http,
                url,
                self.timeout_s,
                self.max_retries,
                self.backoff_s,
                self.max_wait_s,
                self._key,
                events,
            )


def _http_library() -> Any:
    try:
        import httpx2
    except ModuleNotFoundError:
        raise ConfigError("a server is asked through httpx2, which is not installed; pip install httpx2") from None
    return httpx2


def _checked_url(owner: str, base_url: str) -> str:
    parts = urlsplit(base_url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"{owner}.base_url holds a user, a password, a query or a fragment, which would be written into "
            "manifests; give a plain address, and a key through api_key_env"
        )
    try:
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise ConfigError(f"{owner}.base_url is {base_url!r}; expected http or https, as http://127.0.0.1:8000/v1")
    return base_url.rstrip("/")


def _is_loopback(host: str | None) -> bool:
    """Whether ``host`` is this machine, which no proxy of the environment may stand before."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _key(owner: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"{owner}.api_key_env names {variable}, which is not set in the environment; export it")
    return key


def _check_numbers(
    owner: str, concurrency: int, timeout_s: float, max_retries: int, backoff_s: float, max_wait_s: float
) -> None:
    for name, value, least in (
        ("concurrency", concurrency, 1),
        ("max_retries", max_retries, 0),
        ("backoff_s", backoff_s, 0.0),
        ("max_wait_s", max_wait_s, 0.0),
    ):
        if not value >= least:
            raise ConfigError(f"{owner}.{name} is {value}; expected at least {least}")
    if not timeout_s > 0:
        raise ConfigError(f"{owner}.timeout_s is {timeout_s}; expected above 0")
