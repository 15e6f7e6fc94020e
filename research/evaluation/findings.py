"""What a preflight found: one line each, and whether a run may go on."""

from dataclasses import dataclass

LEVELS = ("ok", "skipped", "warning", "refusal")


@dataclass(frozen=True)
class Finding:
    """name   what was looked at; level one of LEVELS; told why, with figures."""

    name: str
    level: str
    told: str


def ok(name: str, told: str) -> Finding:
    """Nothing stands against a run."""
    return Finding(name, "ok", told)


def skipped(name: str, told: str) -> Finding:
    """This could not be looked at."""
    return Finding(name, "skipped", told)


def warning(name: str, told: str) -> Finding:
    """A run may go on, and will likely disappoint."""
    return Finding(name, "warning", told)


def refusal(name: str, told: str) -> Finding:
    """A run would learn from noise."""
    return Finding(name, "refusal", told)
