"""A text with bars over its tokens: places and heights by hand."""

import pytest
from matplotlib.figure import Figure

from research.results.token_figure import LINE_HEIGHT, Slot, draw_tokens, token_slots


def test_tokens_stand_side_by_side_and_wrap() -> None:
    """Behind a prompt of three columns: 3, 5; then `ccc` would end at column 9 of 8 and begins a line."""
    assert token_slots(["aa", "b", "ccc", "", "dddd"], indent=3, columns=8) == [
        Slot(0, 3, 2), Slot(0, 5, 1), Slot(1, 0, 3), Slot(1, 3, 1), Slot(1, 4, 4),
    ]  # fmt: skip
    assert token_slots(["x" * 9, "y"], columns=8) == [Slot(0, 0, 9), Slot(1, 0, 1)]
    assert token_slots(["aa"], indent=8, columns=8) == [Slot(1, 0, 2)]


def test_a_bar_is_as_high_as_its_value() -> None:
    axes = Figure().add_subplot()
    draw_tokens(axes, ["12", ";", "\n", "<eos>"], [0.5, 2.0, 0.0, 0.1], prompt="1+1=", others=["12", ";", "3", "<eos>"])
    bars = axes.patches
    assert [bar.get_height() for bar in bars] == pytest.approx([0.25, 1.0, 0.0, 0.05]), "a share of the largest"
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([5.0, 6.5, 7.5, 10.5])
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("3") == 1 and texts.count("12") == 1, "below a token stands only what differs from it"
    assert "↵" in texts and texts[:4] == ["1", "+", "1", "="]
    assert {"0.5", "2"} <= set(texts) and "0.1" not in texts, "a bar of a twentieth carries no number"


def test_several_drawings_share_a_scale_and_lines_lie_below_each_other() -> None:
    axes = Figure().add_subplot()
    slots = draw_tokens(axes, ["ab", "cd", "ef"], [1.0, 2.0, 4.0], highest=8.0, columns=4)
    assert [slot.line for slot in slots] == [0, 0, 1]
    assert [bar.get_height() for bar in axes.patches] == [0.125, 0.25, 0.5]
    assert axes.patches[0].get_y() - axes.patches[2].get_y() == pytest.approx(LINE_HEIGHT)


def test_what_cannot_be_drawn_is_refused() -> None:
    axes = Figure().add_subplot()
    with pytest.raises(ValueError, match="1 values for 2 tokens"):
        draw_tokens(axes, ["a", "b"], [1.0])
    with pytest.raises(ValueError, match="2 values and 1 others for 2 tokens"):
        draw_tokens(axes, ["a", "b"], [1.0, 1.0], others=["a"])
    with pytest.raises(ValueError, match=r"least value is -0\.5"):
        draw_tokens(axes, ["a", "b"], [1.0, -0.5])
    assert draw_tokens(axes, [], []) == []
    draw_tokens(axes, ["a"], [-1e-9])
    assert axes.patches[-1].get_height() == 0.0, "a KL that rounding made negative"
