"""Who works on a trial, and whether that process still lives: a kill -9 leaves no farewell."""

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """This process, told so that another one can look for it: where it runs, its number and when that began."""
    return {"host": _host(), "pid": os.getpid(), "start": _start_of(os.getpid())}


def is_this_process(owner: Mapping[str, Any] | None) -> bool:
    """Whether an owner is this very process."""
    return {key: (owner or {}).get(key) for key in this_process()} == this_process()


def is_same_machine(owner: Mapping[str, Any]) -> bool:
    """Whether an owner's process numbers mean anything here."""
    return owner.get("host") == _host()


def is_alive(owner: Mapping[str, Any]) -> bool:
    """Whether the owner's process, on this machine, still runs; a number that was given anew is another process."""
    pid = int(owner["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(_start_of(pid) == owner.get("start")) and not _is_zombie(pid)


@dataclass
class Beats:
    """When each lease was last seen to change, by this process's own clock: clocks of machines differ.

    stale_s   a lease from another machine that has not changed for so long is nobody's any more
    """

    stale_s: float
    seen: dict[int, tuple[Any, float]] = field(default_factory=dict)

    def is_stale(self, number: int, lease: Mapping[str, Any] | None) -> bool:
        """Whether the lease of trial `number` belongs to nobody any more."""
        if lease and is_same_machine(lease):
            return not is_alive(lease)
        beat = (lease or {}).get("beat", "none")
        known = self.seen.get(number)
        if known is None or known[0] != beat:
            self.seen[number] = (beat, time.monotonic())
            return False
        return time.monotonic() - known[1] > self.stale_s


def _host() -> str:
    """The machine and, within a container, its own counting of processes."""
    try:
        spaces = os.readlink("/proc/self/ns/pid")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        spaces = boot = ""
    return f"{platform.node()} {boot} {spaces}".strip()


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _start_of(pid: int) -> str:
    stat = _stat(pid)
    return stat[19] if len(stat) > 19 else ""


def _is_zombie(pid: int) -> bool:
    stat = _stat(pid)
    return bool(stat) and stat[0] in "ZX"
