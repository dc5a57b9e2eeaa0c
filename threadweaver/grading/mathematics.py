"""Whether an answer and a ground truth mean the same: as words, as numerals, else by math-verify.

math-verify compares formulas. It takes what it gets for one, so that words are products of letters
(listen = silent), subscripts of numerals are lost (1011_2 = 1011_3) and units are too (5 m = 5 km);
it reads capitals as small letters (m/M = 1); and it compares to a fixed number of decimals
(2^{-81} = 2^{-80}). This is what is decided before.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from typing import Any

# Decimals that are compared at least, and those of its digits that are not leading zeros.
DECIMALS, SIGNIFICANT = 6, 5
MOST_DECIMALS = 10_000

# Characters for which LaTeX has a command, and dashes that are minus signs, by code.
_SYMBOLS = {
    **dict.fromkeys((0x2010, 0x2011, 0x2012, 0x2013, 0x2014, 0x2212), "-"),
    **dict.fromkeys((0xA0, 0x2009, 0x202F), " "),
    **dict.fromkeys((0x20AC, 0xA3, 0xA5), "$"),
    **dict.fromkeys((0x2019, 0x2032), "'"),
    0xD7: "\\times ",
    0xB7: "\\cdot ",
    0x22C5: "\\cdot ",
    0xF7: "/",
    0xB1: "\\pm ",
    0x221A: "\\sqrt ",
    0x221E: "\\infty ",
    0x3C0: "\\pi ",
    0x3B8: "\\theta ",
    0xB0: "^\\circ ",
    0x2264: "\\le ",
    0x2265: "\\ge ",
    0x2260: "\\ne ",
    0x2248: "\\approx ",
    0x222A: "\\cup ",
    0x2229: "\\cap ",
    0x2205: "\\emptyset ",
    0x2208: "\\in ",
}
_TEXT = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|operatorname)"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:pounds|euro)(?![a-zA-Z])", r"$"),
        (r"\\(?:varnothing|O)(?![a-zA-Z])", r"\\emptyset"),
        (rf"{_TEXT}\s*\{{\s*infinity\s*\}}", r"\\infty"),
        (r"\*\*", "^"),
        (r"(?<=[0-9])(?:\\[,;:! ]|\{,\}|\s)\s*(?=[0-9]{3}(?![0-9]))", ""),  # 1\,000\,000
        (r"(?<![0-9/.])([0-9]+)\s+([0-9]+)/([0-9]+)(?![0-9/])", r"\1\\frac{\2}{\3}"),  # 1 1/2
        (r"(?:\s|\\\\|\\[,;! ])+$|^\s+", ""),
        (r"(?<!\.)\.$", ""),
    )
]
_E_NOTATION = re.compile(
    r"(?<![0-9a-zA-Z.])([+-]?[0-9]+(?:\.[0-9]*)?)[eE]([+-]?[0-9]+)(?![0-9a-zA-Z.])"
)
_POWER_OF_TEN = re.compile(
    r"(?<![0-9a-zA-Z.^/])(?<!\^\{)([0-9]+(?:\.[0-9]*)?)\s*(?:\\times|\\cdot|\*)\s*"
    r"10\^(?:\{([+-]?[0-9]+)\}|([0-9]))(?![0-9.^!])"
)
_REPEATING = re.compile(r"(?<![0-9])([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{?([0-9]+)\}?")
_UNWRAP = re.compile(rf"{_TEXT}\s*\{{([^{{}}]*)\}}")
_WORDS = re.compile(r"(?:[^\W\d_]|[\s,;'\-])*")  # and nothing else
_SEPARATOR = re.compile(r"\s*(?:[,;]|\band\b|\bor\b)\s*")
_HYPHEN = re.compile(r"\s*-\s*")
_LONG_WORD = re.compile(r"(?<!\\)(?<![a-zA-Z])[^\W\d_]{3,}")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
# A choice, and what it says; nothing of which a part is a choice of its own: A: 5, B: 3.
_CHOICE = re.compile(
    r"\(?([A-J])(?:[).:](?:\s(?!.*(?<![\w(])\(?[A-Z][).:](?:\s|$))(.*))?)?", re.DOTALL
)
_HALF_OF_DAY = re.compile(r"[0-9]\s*([aApP])\.?\s?[mM]\.?$")
_MILLI_OR_MEGA = re.compile(r"[0-9}\s]\s*([mM])([A-Z][a-zA-Z]*)$")
_UNIT = re.compile(r"[0-9}\s]\s*([a-zA-Z]+)\s*(?:\^\{?([0-9])\}?)?$")
_FORMULA = re.compile(r"[\\=+*/^_<>|]|\b[a-zA-Z]\s*-|-\s*[a-zA-Z]\b")
_VARIABLE = re.compile(rf"{_TEXT}\s*\{{[^{{}}]*\}}|\\[a-zA-Z]+|[a-zA-Z]{{3,}}|([a-zA-Z])")
_STAND_INS = ("\\xi", "\\chi", "\\psi", "\\eta", "\\kappa", "\\tau", "\\nu", "\\omega", "\\phi")
_BASES = {
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "twelve": "12",
    "sixteen": "16",
}
_NUMERAL = re.compile(rf"([0-9A-Z][0-9a-zA-Z]*)_\{{?({'|'.join(_BASES)}|[0-9]+)\}}?")

# Of the kinds that answers are of. What their parser learns from them it does not learn again in
# the child of every answer.
_EXAMPLES = [
    ("1/2", "0.5"),
    ("-3", "\\frac{1}{2}"),
    ("1,234", "1234"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("(1, 2)", "(1, 3)"),
    ("[1,2)", "(-\\infty,3]\\cup(5,7)"),
    ("50\\%", "0.5"),
    ("2.5\\times 10^{-7}", "10^{16}"),
    ("x=4", "4"),
    ("y=2x+1", "y=2x-1"),
    ("0\\le x\\le 1", "x>3"),
    ("\\frac{\\pi}{2}", "90^\\circ"),
    ("3+4i", "3-4i"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    ("e^{2x}", "\\ln 2"),
    ("\\sin x", "\\cos(x)"),
    ("7\\text{ cm}", "\\text{A}"),
    ("\\pm 7", "\\binom{5}{2}"),
    ("f(x)=x", "5!"),
]


def build_math_grader() -> Callable[..., bool]:
    """A function (answer, *ground truths) -> whether it means the same as any of them, for a
    `Judge` to call."""
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy.physics import units

    def parsed(text: str) -> list[Any]:
        # Without a time limit of its own, which would need signals: the judge has one.
        return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=0)

    def unit(text: str) -> tuple[Any, str] | None:
        """The unit that a number ends with, if sympy knows it, and its power."""
        found = _UNIT.search(text)
        known = found and getattr(units, found[1], None)
        return (known, found[2] or "1") if found and isinstance(known, units.Quantity) else None

    def same_formula(answer: str, truth: str) -> bool:
        ours, theirs = map(parsed, _capitals_apart(truth, answer))
        zeros = max((_leading_zeros(value) for value in (*ours, *theirs)), default=0)
        return verify(
            ours,
            theirs,
            float_rounding=max(DECIMALS, zeros + SIGNIFICANT),
            numeric_precision=15 + zeros,
            allow_set_relation_comp=True,
            timeout_seconds=None,
        )

    def same(answer: str, truth: str) -> bool:
        if not answer or not truth:
            return False
        choice, others = (_CHOICE.fullmatch(_UNWRAP.sub(r"\1", t).strip()) for t in (truth, answer))
        if choice and others:
            says = (choice[2], others[2])
            return choice[1] == others[1] and (None in says or same(others[2], choice[2]))
        ours, theirs = (_UNWRAP.sub(r"\1", text) for text in (truth, answer))
        milli = [_MILLI_OR_MEGA.search(text) for text in (ours, theirs)]
        if all(milli) and len({(found[1], found[2]) for found in milli if found}) > 1:
            return False
        words = _same_words(answer, truth)
        if words is not None:
            return words
        numerals = _same_numerals(answer, truth)
        if numerals is not None:
            return numerals
        if _other_words(ours, theirs) or (
            (halves := [_HALF_OF_DAY.search(text) for text in (ours, theirs)])
            and all(halves)
            and len({half[1].lower() for half in halves if half}) > 1
        ):
            return False
        if (unit(ours) or unit(theirs)) != (unit(theirs) or unit(ours)):
            return False
        return same_formula(answer, truth)

    def grade(answer: str, *truths: str) -> bool:
        theirs = readings(answer)
        return any(same(a, t) for truth in truths for t in readings(truth) for a in theirs)

    for example in _EXAMPLES:
        same_formula(*example)
    return grade


def _plain(text: str) -> str:
    """An answer in LaTeX and ASCII, as far as it has characters and notations from elsewhere."""
    text = "".join(map(_character, text)).translate(_SYMBOLS).strip()
    if text.startswith("$") and text.endswith("$") and len(text) > 1:
        text = text.strip("$")
    if re.fullmatch(r"\\\(.*\\\)|\\\[.*\\\]", text, re.DOTALL):
        text = text[2:-2]
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _REPEATING.sub(_fraction, text)
    return _POWER_OF_TEN.sub(_written_out, text).strip()


def readings(text: str) -> set[str]:
    """What an answer may stand for: 2e-3 is 0.002, or twice Euler's number less 3."""
    text = _plain(text)
    return {text, _E_NOTATION.sub(_written_out, text)}


def _character(character: str) -> str:
    """A character that is another in a smaller or wider shape, as that one: a
    superscript, a fraction, a wide digit."""
    kind, _, codes = unicodedata.decomposition(character).partition("> ")
    plain = "".join(chr(int(code, 16)) for code in codes.split()) if codes else ""
    if kind == "<super":
        return f"^{{{plain}}}"
    if kind == "<sub":
        return f"_{{{plain}}}"
    if kind == "<wide":
        return plain
    if kind == "<fraction":
        above, _, below = plain.partition("\u2044")
        return f"\\frac{{{above}}}{{{below}}}" if above and below else character
    return character


def _written_out(found: re.Match[str]) -> str:
    """The decimal that stands for 2.5e-7 or 2.5\\times 10^{-7}, exactly; itself if
    that is too long."""
    number, power = found[1], int(next(filter(None, found.groups()[1:])))
    if abs(power) > MOST_DECIMALS:
        return f"{number}\\times 10^{{{power}}}"
    return f"{Decimal(number) * Decimal(10) ** power:f}"


def _fraction(found: re.Match[str]) -> str:
    """What stands for 0.1\\overline{6}, exactly."""
    whole, fixed, period = found[1] or "0", found[2], found[3]
    below = (10 ** len(period) - 1) * 10 ** len(fixed)
    above = int(whole + fixed + period) - int(whole + fixed)
    return f"\\frac{{{above}}}{{{below}}}"


def _same_words(answer: str, truth: str) -> bool | None:
    """Whether two answers in words are the same; None unless both are in words.

    Words are separated by commas, "and" and "or" into a list, the order of which does not matter.
    """
    texts = [_UNWRAP.sub(r" \1 ", text) for text in _capitals_apart(answer, truth)]
    texts = [" ".join(_HYPHEN.sub("-", text).casefold().split()) for text in texts]
    if texts[0] == texts[1] and re.search(r"[^\W\d_]{2}", texts[0]):
        return True
    texts = [text.replace(".", "").strip("\"' ") for text in texts]
    if all(_WORDS.fullmatch(t) and re.search(r"[^\W\d_]{2}", t) for t in texts):
        ours, theirs = (sorted(filter(None, _SEPARATOR.split(text))) for text in texts)
        # What has a hyphen may be a difference: xy - z.
        return ours == theirs or (None if any("-" in text for text in texts) else False)
    return None


def _capitals_apart(*texts: str) -> list[str]:
    """Texts for the parser, which reads capitals as small letters. Where one of them is a formula
    with a variable and its capital, a Greek letter that none of them has takes the capital's place.
    """
    apart = set()
    for text in filter(_FORMULA.search, texts):
        letters = {found[1] for found in _VARIABLE.finditer(text) if found[1]}
        apart |= {letter for letter in letters if letter.isupper() and letter.lower() in letters}
    free = [letter for letter in _STAND_INS if not any(letter in text for text in texts)]
    names = dict(zip(sorted(apart), free, strict=False))
    return [
        _VARIABLE.sub(lambda found: f"{names[found[1]]} " if found[1] in names else found[0], text)
        for text in texts
    ]


def _other_words(truth: str, answer: str) -> bool:
    """Whether words within two formulas differ though their letters are the same."""
    ours, theirs = (
        sorted(word.casefold() for word in _LONG_WORD.findall(_COMMAND.sub(" ", text)))
        for text in (truth, answer)
    )
    return ours != theirs and sorted("".join(ours)) == sorted("".join(theirs))


def _same_numerals(answer: str, truth: str) -> bool | None:
    """Whether two numerals are the same, of which one or both say their base; None if none does."""
    ours, theirs = _numeral(truth), _numeral(answer)
    if ours[1] is None and theirs[1] is None:
        return None
    same_base = ours[1] == theirs[1] or ours[1] is None or theirs[1] is None
    return same_base and ours[0].lstrip("0") == theirs[0].lstrip("0")


def _numeral(text: str) -> tuple[str, str | None]:
    """Digits and base; the text and None for what is no numeral with a base."""
    text = re.sub(r"[\s,]|\\[,!]", "", _UNWRAP.sub(r"\1", text))
    found = _NUMERAL.fullmatch(text)
    if not found:
        return text.casefold(), None
    base = _BASES.get(found[2], found[2])
    try:
        int(found[1], int(base))
    except ValueError:
        return text.casefold(), None
    return found[1].casefold(), base


def _leading_zeros(value: Any) -> int:
    """Of the smallest number but 0 in a value that math-verify has parsed, after its point."""
    from sympy import Basic, Expr

    if not isinstance(value, Basic) or getattr(value, "free_symbols", None):
        return 0
    if not isinstance(value, Expr):  # a set, an interval, a tuple
        return max(map(_leading_zeros, value.args), default=0)
    try:
        size = abs(complex(value.evalf(5)))
        power = math.floor(math.log10(size)) if size else int(_log10(value))
    except (TypeError, ValueError, ArithmeticError):
        return 0
    return min(max(0, -1 - power), MOST_DECIMALS)


def _log10(value: Any) -> float:
    """Of a number too small for a double."""
    from sympy import log

    return float(log(abs(value.evalf(5)), 10).evalf(5))
