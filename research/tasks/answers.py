r"""Which part of a written answer is graded: the last box, what stands between ``$`` signs, what follows ``x =``.

Nothing here searches for a known answer, or for a number within a sentence.
"""

import re

BOX = r"\boxed"
WRAPPED = (re.compile(r"\$\$?(.*?)\$?\$", re.DOTALL), re.compile(r"\\[(\[](.*)\\[)\]]", re.DOTALL))
ASSIGNED = re.compile(r"[A-Za-z]\s*=")


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}``, braces balanced; None where there is none, or it is not closed."""
    _, mark, rest = text.rpartition(BOX)
    rest = rest.lstrip()
    if not mark or not rest.startswith("{"):
        return None
    depth = 0
    for place, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return rest[1:place]
    return None


def unboxed(text: str) -> str:
    r"""What an answer puts into its last ``\boxed{...}``, "" where that is not closed; the whole answer without one."""
    return ((boxed(text) or "") if BOX in text else text).strip()


def unwrapped(text: str) -> str:
    r"""An answer, :func:`unboxed`, without the ``$..$``, ``\(..\)`` or ``\[..\]`` around the whole of it."""
    text = unboxed(text).removesuffix(".")
    for pattern in WRAPPED:
        found = pattern.fullmatch(text)
        if found and "$" not in found[1]:
            text = found[1].strip()
    return text


def value_part(text: str) -> str:
    """The part of an answer that has to be its number: :func:`unwrapped`, without one leading ``x =`` of one letter."""
    text = unwrapped(text)
    return ASSIGNED.sub("", text, count=1).strip() if ASSIGNED.match(text) else text
