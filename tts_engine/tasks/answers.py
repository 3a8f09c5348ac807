"""The final answer in a solution's text, and the form in which two answers are compared without algebra.

Knows text, integers and fractions only. What `decide` leaves open, grader.py settles in a worker process.
"""

import re
from collections.abc import Callable
from fractions import Fraction

LONGEST_NUMBER = 1000  # characters; whatever is longer is compared as text

_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)\s+((?:[^\s${}]|\{[^{}]*\})+)|\\.|[{}]", re.DOTALL)
_PHRASE = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*:)\s*([^\n]+)", re.IGNORECASE)
_FENCES = ((r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))

_DECIMAL = re.compile(r"[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)")
_FRACTION = re.compile(r"([-+]?)([0-9]+)?\\frac\{([0-9]+)\}\{([0-9]+)\}")
_WORDS = re.compile(r"[A-Za-z]{4,}(?: [A-Za-z]+)*")


def _braced(match: re.Match[str]) -> str:
    return rf"\frac{{{match[1].strip('{}')}}}{{{match[2].strip('{}')}}}"


# Spellings of one thing become one spelling, in this order. Nothing here may join two answers that differ.
_ARGUMENT = r"\s*(\{[^{}]*\}|[0-9a-zA-Z])"
_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("\u2212", "-"),
        (r"(?<=[0-9])(?:\{,\}|,\\!\s*|\\,)(?=[0-9]{3})", ","),  # TeX's ways to group thousands
        (r"\\(?:left|right)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\[!,;:> ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\(?:text|textbf|textit|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac" + _ARGUMENT + _ARGUMENT, _braced),
        (r"^\\frac\{-([0-9]+)\}", r"-\\frac{\1}"),
        (r"^\s*([-+]?(?:[0-9]+ +)?)([0-9]+)\s*/\s*([0-9]+)\s*\.?\s*$", r"\1\\frac{\2}{\3}"),
        (r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"([_^])\{([0-9a-zA-Z])\}", r"\1\2"),
        (r"\^\s*\\circ(?![a-zA-Z])|\^\s*\{\s*\\circ\s*\}|\\degree(?![a-zA-Z])|°", ""),
        (r"\\?\$", ""),
        (r"\s+(?![0-9a-zA-Z])|(?<![0-9a-zA-Z])\s+", ""),  # a blank between letters or digits says something: 2 1/2
        (r"\s+", " "),
        (r"\.$", ""),
    )
]


def extract_answer(text: str) -> str | None:
    r"""The answer a solution commits to: its last complete `\boxed{}`, else its last "the answer is" phrase, else None.

    A number that merely comes last is never taken: a solution cut off in mid-computation would vote for an intermediate
    value, and a vote for nothing is better than a vote for anything. Inside a box the braces must balance, so a box that
    was cut off counts as absent; an empty one too.
    """
    found = _last_box(text)
    if found is None:
        phrases = [_phrase_value(match[1]) for match in _PHRASE.finditer(text)]
        found = next((phrase for phrase in reversed(phrases) if phrase), None)
    return found


def canonical(answer: str) -> Fraction | str:
    """One form for all plain spellings of an answer: a Fraction for a plain number, else text without its decoration.

    Plain numbers are integers, decimals (taken exactly: 0.33 is not 1/3), simple fractions and mixed numbers; thousands
    marks, a currency sign and a degree sign are decoration. Words are compared without case.
    """
    text = answer.strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    number = _number(text)
    if number is not None:
        return number
    return text.casefold() if _WORDS.fullmatch(text) else text


def decide(left: Fraction | str, right: Fraction | str) -> bool | None:
    """Whether two canonical forms are equal, as far as text and arithmetic can tell; None where it takes algebra.

    Two plain numbers, or two words of at least four letters, are always decided: algebra would read words as products,
    and `east` would equal `seat`.
    """
    if left == right:
        return True
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return False
    if isinstance(left, str) and isinstance(right, str) and _WORDS.fullmatch(left) and _WORDS.fullmatch(right):
        return False
    return None


def _last_box(text: str) -> str | None:
    found = None
    opened: list[int | None] = []  # for every brace still open: where its box's content starts, None if it is no box
    for token in _BOX_TOKEN.finditer(text):
        content = ""
        if token[1]:
            content = token[1]
        elif token[0] == "}":
            start = opened.pop() if opened else None
            content = text[start : token.start()] if start is not None else ""
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append(None if token[0] == "{" else token.end())
        found = _tidy(content) or found
    return found


def _phrase_value(rest: str) -> str:
    """What a phrase names: the formula it starts with (as Meta's closing sentence does), else all up to the sentence's end."""
    if "boxed" in rest or "fbox" in rest:
        return ""  # a box that was cut off or empty
    formula = re.match(r"\$+([^$]+)\$", rest)
    return _tidy(formula[1] if formula else re.split(r"\.\s", rest, maxsplit=1)[0])


def _tidy(answer: str) -> str:
    """The answer without the punctuation and the math fences around it."""
    while True:
        bare = answer.strip().lstrip("$").rstrip(".,;:$ ")
        if bare.endswith("\\"):
            bare = answer.strip()  # what follows the backslash belongs to it: a space of TeX's, a dollar that is money
        for opening, closing in _FENCES:
            if len(bare) > len(opening) and bare.startswith(opening) and bare.endswith(closing):
                bare = bare[len(opening) : -len(closing)]
        if bare == answer:
            return bare
        answer = bare


def _number(text: str) -> Fraction | None:
    if len(text) > LONGEST_NUMBER:
        return None
    if _DECIMAL.fullmatch(text):
        return Fraction(text.replace(",", ""))
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    whole, numerator, denominator = int(match[2] or 0), int(match[3]), int(match[4])
    if denominator == 0 or (match[2] and numerator >= denominator):
        return None
    value = whole + Fraction(numerator, denominator)
    return -value if match[1] == "-" else value
