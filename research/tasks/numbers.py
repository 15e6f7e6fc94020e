"""Numbers as people and models write them, read exactly or not at all."""

import re
from dataclasses import dataclass, field
from fractions import Fraction

from research.records import Verdict
from research.tasks.answers import value_part

LONGEST = 120  # characters of an answer that can still be one number
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,60})"
PLAIN = rf"(?:{DIGITS}(?:\.[0-9]{{0,60}})?|\.[0-9]{{1,60}})"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s?(?P<currency>[$€£]?)\s?(?P<inner>[-+]?)(?P<number>{PLAIN})"
    r"(?:(?P<mixed>\s[0-9]{1,30}/[0-9]{1,30})|\s?/\s?(?P<below>[0-9]{1,30}))?"
    r"(?P<percent>\s?(?:%|percent))?(?P<unit>(?:(?:\s|\s?°\s?)[A-Za-z][A-Za-z/-]{0,20}\.?){0,4})"
)
# words that make another number, a second one, or a sentence of what stands before them
_JOINING = """or and to plus minus times over by point dot divided multiplied less more than of out not squared cubed e
    k m b bn mn tn mln bln trn is was are were no nor never neither but if unless wrong incorrect false
    invalid"""
_COUNTING = """half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths
    eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths millionth millionths
    billionth billionths percent pct tens hundred hundreds thousand thousands million millions billion
    billions trillion trillions lakh lakhs crore crores grand dozen dozens twice thrice zero one two three
    four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety"""
NOT_A_UNIT = frozenset(_JOINING.split() + _COUNTING.split())
LATEX = (  # in this order
    (re.compile(r"\\[dt]?frac\{([0-9]{1,30})\}\{([0-9]{1,30})\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\^\{?\\circ\}?"), "°"),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[ ,;:]|~"), " "),
    (re.compile(r"\\([$%€£])"), r"\1"),
)


@dataclass(frozen=True)
class Number:
    """An exact value, and how it was written.

    percent   with a percent sign: ``50%`` has the value 50
    fraction  as a fraction, ``18/2`` or ``3 1/2``; no part of being equal
    """

    value: Fraction
    percent: bool = False
    fraction: bool = field(default=False, compare=False)

    def equals(self, other: "Number") -> bool:
        """Equal values; where one side alone has a percent sign, it may also stand for a hundredth: 50% is 50 and .5.

        That is how word problems use it: asked "what percentage", their key says 50.
        """
        if self.percent == other.percent:
            return self.value == other.value
        share, bare = (self, other) if self.percent else (other, self)
        return bare.value in (share.value, share.value / 100)


def parse_number(text: str) -> Number | None:
    """The one number that ``text`` is; None where it is none, more than one, or longer than any number needs.

    Read: ``1,000``  ``$18``  ``-$5``  ``18.0``  ``18.``  ``.5``  ``3/4``  ``3 1/2``  ``50%``  ``18 dollars`` (up to
    four words behind, none of which is itself a number, joins two or makes a sentence), and the LaTeX that wraps such
    forms. Not read: words before the number, ``1,00``, ``1e3``, ``18 or 8``, ``5 thousand``, ``5 dozens``, ``18 is
    wrong``, digits of other scripts.
    """
    if len(text) > LONGEST:
        return None
    text = plain_text(text)
    found = NUMBER.fullmatch(text.removesuffix("$").strip() if text.startswith("$") else text)
    if not found or (found["sign"] and found["inner"]):
        return None
    if any(_is_no_unit(word) for word in found["unit"].replace("°", " ").split()):
        return None
    value = _fraction(found["number"].replace(",", ""), found["mixed"], found["below"])
    if value is None:
        return None
    is_fraction = bool(found["mixed"] or found["below"])
    return Number(-value if "-" in (found["sign"], found["inner"]) else value, bool(found["percent"]), is_fraction)


def parse_answer(text: str) -> Number | None:
    r"""The number that an answer gives: :func:`parse_number` of its last ``\boxed{..}``, or of what follows ``x =``.

    None where that part is no number: an empty or unclosed box, words around a number outside of any box.
    """
    return parse_number(value_part(text))


def plain_text(text: str) -> str:
    """A number's text without LaTeX, its signs and blanks in one form."""
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    return re.sub(r"\s+", " ", text.replace("\u2212", "-").replace("\u2013", "-")).strip().removesuffix(".")


def _is_no_unit(word: str) -> bool:
    """Whether a word is in NOT_A_UNIT, or made of such words alone, as ``twenty-one`` is and ``two-litre`` is not."""
    return all(part in NOT_A_UNIT for part in re.split("[-/]", word.strip(".").lower()) if part)


def _fraction(number: str, mixed: str | None, below: str | None) -> Fraction | None:
    value = Fraction(number.removesuffix(".") if len(number) > 1 else number)
    if mixed:
        above, _, mixed_below = mixed.strip().partition("/")
        return None if int(mixed_below) == 0 else value + Fraction(int(above), int(mixed_below))
    if below:
        return None if int(below) == 0 else value / int(below)
    return value


def verify_number(gold: str, answer: str | None) -> Verdict:
    """The verdict on an answer, read by :func:`parse_answer`, that must be the same number as the gold answer."""
    expected, given = parse_number(gold), None if answer is None else parse_answer(answer)
    if expected is None or given is None:
        return Verdict.UNPARSED
    return Verdict.CORRECT if expected.equals(given) else Verdict.WRONG


def canonical(value: Fraction) -> str:
    """The shortest exact text of a value: ``450``, ``-0.5``, and ``1/3`` where no decimal ends."""
    if value.denominator == 1:
        return str(value.numerator)
    twos = fives = 0
    rest = value.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
