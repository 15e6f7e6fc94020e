"""Hydra's override grammar: writing a text into it."""

import re


def quoted(text: str) -> str:
    """A text as one value of the grammar, whatever it contains; backslashes count there before a quote alone."""
    return "'" + re.sub(r"(\\*)('|$)", lambda run: run[1] * 2 + ("\\'" if run[2] else ""), text) + "'"
