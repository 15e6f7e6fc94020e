"""Which writing system a character belongs to, from the Unicode character database that Python carries."""

import unicodedata
from functools import lru_cache

# The first word of a letter's Unicode name, for the scripts a language model is likely to slip into. Letters of no
# script in this list (mathematical alphabets, the micro sign, modifiers) belong to every text.
SCRIPTS = {
    "LATIN": "latin",
    "FULLWIDTH": "latin",
    "GREEK": "greek",
    "CYRILLIC": "cyrillic",
    "CJK": "han",
    "HIRAGANA": "kana",
    "KATAKANA": "kana",
    "HALFWIDTH": "kana",
    "HANGUL": "hangul",
    "ARABIC": "arabic",
    "HEBREW": "hebrew",
    "DEVANAGARI": "devanagari",
    "BENGALI": "bengali",
    "TAMIL": "tamil",
    "TELUGU": "telugu",
    "GUJARATI": "gujarati",
    "GURMUKHI": "gurmukhi",
    "KANNADA": "kannada",
    "MALAYALAM": "malayalam",
    "SINHALA": "sinhala",
    "THAI": "thai",
    "LAO": "lao",
    "KHMER": "khmer",
    "MYANMAR": "myanmar",
    "TIBETAN": "tibetan",
    "GEORGIAN": "georgian",
    "ARMENIAN": "armenian",
    "ETHIOPIC": "ethiopic",
    "MONGOLIAN": "mongolian",
}
SCRIPT_NAMES = tuple(dict.fromkeys(SCRIPTS.values()))


@lru_cache(maxsize=65_536)
def script_of(character: str) -> str | None:
    """The script of a letter, one of SCRIPT_NAMES; None for anything else: digits, marks, symbols."""
    if not character.isalpha():
        return None
    return SCRIPTS.get(unicodedata.name(character, "").partition(" ")[0])
