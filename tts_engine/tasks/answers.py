"""The final answer in a solution's text, and the form in which two answers are compared without algebra.

Knows text, integers and fractions only. What `decide` leaves open, grader.py settles in a worker process.
"""

import re
from collections.abc import Callable
from fractions import Fraction

LONGEST = 1000  # characters; whatever is longer is compared as text
LONGEST_PHRASE = 1000  # characters that "the answer is" can introduce

_BOX = r"\\(?:boxed|fbox)"
_BOX_TOKEN = re.compile(
    rf"(?P<open>{_BOX}\s*\{{|\{{)|{_BOX}\s+(?P<bare>(?:[^\s${{}}]|\{{[^{{}}]*\}})+)|(?P<close>\}})|\\.", re.DOTALL
)
_PHRASE = re.compile(r"\banswer\**(?:\s+is\b\**\s*:?|\s*:)[*\s]*", re.IGNORECASE)  # asterisks: bold in Markdown
_FENCES = ((r"\(", r"\)"), (r"\[", r"\]"))

_DECIMAL = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_FRACTION = re.compile(r"([-+]?)([0-9]+)?\\frac\{([0-9]+)\}\{([0-9]+)\}")
_WORDS = re.compile(r"[A-Za-z]{4,}(?: [A-Za-z]+)*")
_NUMERAL = re.compile(r"[-+]?[0-9][0-9A-F]*_[0-9]+")  # in the base that its index says
_CLOSED_INFINITY = re.compile(r"\[-\\infty|\\infty\]")


def _braced(match: re.Match[str]) -> str:
    return rf"\frac{{{match[1].strip('{}')}}}{{{match[2].strip('{}')}}}"


def _without_commas(match: re.Match[str]) -> str:
    return match[0].replace(",", "")


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
        (r"^\s*[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?\s*$", _without_commas),  # while `1, 234` still shows that it is a list
        (r"\s+(?![0-9a-zA-Z])|(?<![0-9a-zA-Z])\s+", ""),  # a blank between letters or digits says something: 2 1/2
        (r"\s+", " "),
        (r"\.$", ""),
        (r"^([-+]?)0*([0-9][0-9A-F]*_)\{?([0-9]+)\}?$", r"\1\2\3"),
    )
]


def extract_answer(text: str) -> str | None:
    r"""The answer a solution commits to: its last complete `\boxed{}`, else its last "the answer is" phrase, else None.

    A number that merely comes last is never taken: a solution cut off in mid-computation would vote for an intermediate
    value, and a vote for nothing is better than a vote for anything. Inside a box the braces must balance, so a box that
    was cut off counts as absent; an empty one too.
    """
    box = _last_box(text)
    return _last_phrase(text) if box is None else box


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

    Two plain numbers are always decided, and so is what algebra would misread: of two words of at least four letters it makes
    products, so that `east` would equal `seat`; of `52_8` and `52_4` it drops the bases; it opens every interval at infinity.
    """
    if left == right:
        return True
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return False
    texts = [form for form in (left, right) if isinstance(form, str)]
    if any(len(text) > LONGEST for text in texts):
        return False
    if len(texts) == 2 and any(all(kind.fullmatch(text) for text in texts) for kind in (_WORDS, _NUMERAL)):
        return False
    if len(texts) == 2 and bool(_CLOSED_INFINITY.search(texts[0])) != bool(_CLOSED_INFINITY.search(texts[1])):
        return False
    return None


def _last_box(text: str) -> str | None:
    """What is in the last box to open, of those that close and are not empty (so of nested ones the inner)."""
    found, found_at = None, -1
    opened: list[int | None] = []  # for every brace still open: where its box's content starts, None if it is no box
    for token in _BOX_TOKEN.finditer(text):
        kind = token.lastgroup
        if kind == "open":
            opened.append(None if token[0] == "{" else token.end())
            continue
        start = token.start("bare") if kind == "bare" else opened.pop() if kind == "close" and opened else None
        if start is not None and start > found_at:
            content = _tidy(text[start : token.end() if kind == "bare" else token.start()])
            if content:
                found, found_at = content, start
    return found


def _last_phrase(text: str) -> str | None:
    """What the last phrase names: the formula it starts with (as Meta's closing sentence does), else all up to the sentence's end.

    A phrase about a box that was cut off or empty names nothing.
    """
    for end in reversed([match.end() for match in _PHRASE.finditer(text)]):
        rest = text[end : end + LONGEST_PHRASE].partition("\n")[0]
        if "boxed" in rest or "fbox" in rest:
            continue
        formula = re.match(r"\$+([^$]+)\$", rest)
        answer = _tidy(formula[1] if formula else re.split(r"\.\s", rest, maxsplit=1)[0])
        if answer:
            return _tidy(answer.removesuffix("**"))
    return None


def _tidy(answer: str) -> str:
    """The answer without the punctuation and the math fences around it."""
    while True:
        bare = answer.strip().lstrip("$").rstrip(".,;:$ ")
        if bare.endswith(("\\", r"\right")):
            bare = answer.strip()  # what follows belongs to the command: `\,` is a blank, `\$` money, `\right.` a bracket
        for opening, closing in _FENCES:
            if len(bare) > len(opening) and bare.startswith(opening) and bare.endswith(closing):
                bare = bare[len(opening) : -len(closing)]
        if bare == answer:
            return bare
        answer = bare


def _number(text: str) -> Fraction | None:
    if len(text) > LONGEST:
        return None
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    whole, numerator, denominator = int(match[2] or 0), int(match[3]), int(match[4])
    if denominator == 0 or (match[2] and numerator >= denominator):
        return None
    value = whole + Fraction(numerator, denominator)
    return -value if match[1] == "-" else value
