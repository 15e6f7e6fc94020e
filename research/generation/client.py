"""One request to a server, asked again while that can help."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import torch

from research.errors import ConfigError
from research.generation.answers import Malformed

RETRIED_STATUSES = (408, 425, 429)  # and 500 to 599

Reader = Callable[[Any, Counter[str]], Any]  # (decoded JSON, events) -> what it says; raises Malformed


class ServerUnavailable(ConnectionError):
    """A server that stayed down, busy or broken through all attempts."""


class ServerRefusal(ConfigError):
    """A request that the server will not take however often it is asked; ``status`` is HTTP's, None for others."""

    def __init__(self, told: str, status: int | None = None) -> None:
        super().__init__(told)
        self.status = status


@dataclass(frozen=True)
class Failure:
    """Why one attempt failed: the name it is counted under, what was said, and the wait the server asked for."""

    reason: str
    told: str
    retry_after_s: float = 0.0


@dataclass
class CompletionClient:
    """Asks one URL.

    http         an `httpx2.AsyncClient`, which holds connections, headers and the key
    url          the endpoint
    timeout_s    limit of one attempt, from connecting to the last byte
    max_retries  attempts after the first
    backoff_s    wait before the second attempt; doubled every time, up to ``max_wait_s``, and multiplied by a draw from
                 0.5 to 1, so that many clients do not come back at once
    secret       never shown, even where the server repeats it
    events       counts by reason
    """

    http: Any
    url: str
    timeout_s: float
    max_retries: int
    backoff_s: float
    max_wait_s: float
    secret: str | None
    events: Counter[str]

    async def ask(self, body: dict[str, Any] | None, jitter: torch.Generator, read: Reader) -> Any:
        """What ``read`` makes of the answer to ``body``, which is sent by POST; None is a GET.

        Asked again on connection errors, timeouts, status 408, 425, 429 and 500 to 599, and answers that are no
        whole JSON or that ``read`` finds Malformed; ``Retry-After`` is a lower bound of the wait. Raises
        ServerUnavailable when attempts run out or the server asks for a longer wait than ``max_wait_s``, ServerRefusal
        on any other status, and where ``read`` raises it.
        """
        started = time.monotonic()
        attempt = 0
        while True:
            self.events["requests"] += 1
            outcome = await self._attempt(body, read)
            if not isinstance(outcome, Failure):
                return outcome
            wait_s = min(self.backoff_s * 2.0 ** min(attempt, 60), self.max_wait_s)
            wait_s = max(wait_s * (0.5 + 0.5 * torch.rand((), generator=jitter).item()), outcome.retry_after_s)
            attempt += 1
            if attempt > self.max_retries or wait_s > self.max_wait_s:
                asks = f"; it asks to wait {wait_s:.0f} s, max_wait_s is {self.max_wait_s:g}"
                raise ServerUnavailable(
                    f"{self.url} gave no usable answer in {attempt} attempts over "
                    f"{time.monotonic() - started:.0f} s (last: {outcome.told}{asks * (wait_s > self.max_wait_s)})"
                )
            self.events[f"retry: {outcome.reason}"] += 1
            await asyncio.sleep(wait_s)

    async def _attempt(self, body: dict[str, Any] | None, read: Reader) -> Any:
        """What was read, or the Failure of one attempt."""
        import httpx2

        try:
            async with asyncio.timeout(self.timeout_s):
                response = await (self.http.get(self.url) if body is None else self.http.post(self.url, json=body))
        except TimeoutError:
            return Failure("timeout", f"no whole answer within timeout_s={self.timeout_s:g}")
        except httpx2.RequestError as error:
            return Failure("connection", self._shown(f"{type(error).__name__}: {error}"))
        status = response.status_code
        if not 200 <= status <= 299:
            words = self._shown(response.text)[:500]
            if status in RETRIED_STATUSES or 500 <= status <= 599:
                return Failure(f"status {status}", f"status {status}: {words}", retry_after_s(response.headers))
            raise ServerRefusal(f"{self.url} refuses the request with status {status}: {words}", status)
        try:
            return read(json.loads(response.content), self.events)
        except ServerRefusal:
            raise
        except Malformed as error:
            return Failure(error.reason, self._shown(str(error)))
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
            return Failure("half a JSON", self._shown(f"{error} in an answer of {len(response.content)} bytes"))

    def _shown(self, text: str) -> str:
        text = text.replace(self.secret, "***") if self.secret else text
        return " ".join(text.split())


def retry_after_s(headers: Any) -> float:
    """Seconds of a ``Retry-After`` header, given as seconds or as a date; 0 where there is none or it is unreadable."""
    value = str(headers.get("retry-after", "")).strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
