"""A completion as it stands, with a bar over every token: where along the text something happens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from research.results.figure import FAINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR_COLOUR, PROMPT_COLOUR, OTHER_COLOUR = "#0072B2", "#777777", "#D55E00"
LINE_HEIGHT = 2.6  # of one line of text with its bars, where a bar of the highest value is 1 high
SHOWN_WHITESPACE = str.maketrans({"\n": "↵", "\t": "→", " ": "␣"})
LABELLED = 0.15  # bars of a smaller share of the highest carry no number


@dataclass(frozen=True)
class Slot:
    """Where a token stands: its line from 0, its left edge and its width in characters."""

    line: int
    left: int
    width: int


def token_slots(pieces: Sequence[str], *, indent: int = 0, columns: int = 80) -> list[Slot]:
    """Tokens side by side from column ``indent``; one that would pass ``columns`` begins the next line, at column 0.

    A piece takes as many columns as it has characters, one where it has none; one that is wider than a line has a line
    of its own and passes its end.
    """
    slots = []
    line, left = 0, indent
    for piece in pieces:
        width = max(1, len(piece))
        if left > 0 and left + width > columns:
            line, left = line + 1, 0
        slots.append(Slot(line, left, width))
        left += width
    return slots


def draw_tokens(
    axes: "Axes",
    pieces: Sequence[str],
    values: Sequence[float],
    *,
    prompt: str = "",
    others: Sequence[str] | None = None,
    highest: float | None = None,
    columns: int = 80,
    size: float = 12.0,
) -> list[Slot]:
    """Draw ``pieces`` in a monospaced font, over each a bar as high as its value; returns where they stand.

    prompt   text in front of the first token, in grey and without bars; it stays on the first line
    others   for each token what might have stood there; drawn below it, where it differs
    highest  the value of a bar of full height, so that several drawings are comparable; None: the largest one given
    size     of the letters, in points

    Values are 0 or more. Raises ValueError for another number of values or others than of pieces, and for a value
    below 0 that is more than rounding.
    """
    if len(values) != len(pieces) or (others is not None and len(others) != len(pieces)):
        given = f"{len(values)} values" + ("" if others is None else f" and {len(others)} others")
        raise ValueError(f"{given} for {len(pieces)} tokens; give one for each")
    if min(values, default=0.0) < -1e-6:
        raise ValueError(f"the least value is {min(values):g}; a bar's height is 0 or more")
    prompt = prompt.translate(SHOWN_WHITESPACE)
    shown = [piece.translate(SHOWN_WHITESPACE) for piece in pieces]
    slots = token_slots(shown, indent=len(prompt), columns=columns)
    full = highest or max(values, default=0.0) or 1.0
    font: dict[str, Any] = {"family": "monospace", "size": size, "ha": "center", "va": "center"}
    for place, character in enumerate(prompt):
        axes.text(place + 0.5, 0, character, color=PROMPT_COLOUR, **font)
    for number, (slot, piece, value) in enumerate(zip(slots, shown, values, strict=True)):
        middle, base = slot.left + slot.width / 2, -LINE_HEIGHT * slot.line
        axes.text(middle, base, piece, **font)
        bar = axes.bar(middle, max(0.0, value) / full, slot.width * 0.82, bottom=base + 0.35, color=BAR_COLOUR)
        if value >= LABELLED * full:
            axes.bar_label(bar, [f"{value:.2g}"], size=8, padding=1)
        if others is not None and others[number] != pieces[number]:
            other = others[number].translate(SHOWN_WHITESPACE)
            axes.text(middle, base - 0.55, other, color=OTHER_COLOUR, **font)
    last = slots[-1].line if slots else 0
    for line in range(last + 1):
        begin = len(prompt) if line == 0 else 0
        end = max((slot.left + slot.width for slot in slots if slot.line == line), default=begin)
        axes.plot([begin, end], [0.35 - LINE_HEIGHT * line] * 2, color=FAINT, lw=0.6)
    axes.set(xlim=(-0.5, columns + 0.5), ylim=(-LINE_HEIGHT * last - 0.9, 1.7))
    axes.axis("off")
    return slots
