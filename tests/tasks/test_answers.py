import time
from fractions import Fraction

import pytest

from tts_engine.tasks.answers import canonical, decide, extract_answer

EXTRACTED = [
    (r"so it is \boxed{217}", "217"),
    (r"first \boxed{1}, then \boxed{2}.", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\text{a } b_{c_{d}}} done", r"\text{a } b_{c_{d}}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \mid x > 0 \right.}", r"\left\{ x \mid x > 0 \right."),
    (r"\boxed {7}", "7"),
    (r"\fbox{8}", "8"),
    (r"$\boxed 5$ apples", "5"),
    (r"$\boxed \frac{1}{2}$", r"\frac{1}{2}"),
    (r"\boxed{\boxed{3}}", "3"),
    (r"\boxed{ $12$. }", "12"),
    (r"\boxed{\$18.90}", r"\$18.90"),
    (r"\boxed{5\$}", r"5\$"),
    (r"\boxed{5\,}", r"5\,"),
    (r"\boxed{5!}", "5!"),
    (r"\boxed{3} but then \boxed{12", "3"),
    (r"\boxed{3} and an empty \boxed{}", "3"),
    (r"} stray \boxed{4} {", "4"),
    (r"The answer is 9, so \boxed{4}", "4"),
    (r"Therefore, the final answer is: $\boxed{41}$. I hope it is correct.", "41"),
    ("Therefore, the final answer is: $x^2+1$. I hope it is correct.", "x^2+1"),
    ("The answer is 3.14. That is all.", "3.14"),
    ("the answer is 1; no, the answer is 2", "2"),
    ("**Final Answer:** 6", "6"),
    ("The answer is:\n\n42\n", "42"),
    ("Answer: $\\sqrt{2}$ or so", r"\sqrt{2}"),
    (r"THE ANSWER IS \(x+1\).", "x+1"),
    ("the answer is **blue**.", "blue"),
    ("**Answer**: 6", "6"),
    ("The answer is 2**3", "2**3"),
    (r"\boxed{x = \boxed{3}}", "3"),
    (r"The final answer is: $\boxed{12", None),
    (r"The answer is \boxed{}.", None),
    ("2 + 2 = 4, and 4 + 4 = 8", None),
    ("the answer isolates x: 5", None),
    ("no idea", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), EXTRACTED)
def test_the_answer_is_the_last_box_else_the_last_phrase_else_nothing(text: str, answer: str | None):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("007", Fraction(7)),
        ("-3", Fraction(-3)),
        ("\u22123", Fraction(-3)),
        ("+5.", Fraction(5)),
        (".0000672", Fraction(672, 10**7)),
        ("2.50", Fraction(5, 2)),
        ("58,500", Fraction(58500)),
        (r"10,\!080", Fraction(10080)),
        (r"11,\! 111,\! 111,\! 100", Fraction(11111111100)),
        (r"1{,}000\,000", Fraction(10**6)),
        (r"\$32,\!348", Fraction(32348)),
        (r"90^\circ", Fraction(90)),
        (r"90^{\circ}", Fraction(90)),
        ("14/4", Fraction(7, 2)),
        (r"\dfrac{17}{50}", Fraction(17, 50)),
        (r"\frac43", Fraction(4, 3)),
        (r"\frac 59", Fraction(5, 9)),
        (r"\frac9{19}", Fraction(9, 19)),
        (r"-\frac{35}{9}", Fraction(-35, 9)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"137 \frac{1}{2}", Fraction(275, 2)),
        ("-2 1/2", Fraction(-5, 2)),
        ("21/2", Fraction(21, 2)),
        ("1/0", r"\frac{1}{0}"),
        (r"3\frac{5}{2}", r"3\frac{5}{2}"),
        ("1e5", "1e5"),
        ("1,23", "1,23"),
        ("3, 5, 7", "3,5,7"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\text{Evelyn}", "evelyn"),
        (r"052_{8}", "52_8"),
        (r"2A_{16}", "2A_16"),
        (r"\cot x", r"\cot x"),
        (r"a \rightarrow b", r"a\rightarrow b"),
        (r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"\begin{pmatrix}1\\-2\end{pmatrix}"),
        ("9" * 2000, "9" * 2000),
    ],
)
def test_plain_numbers_become_fractions_and_the_rest_loses_its_decoration(answer: str, form: Fraction | str):
    assert canonical(answer) == form
    assert type(canonical(answer)) is type(form)


@pytest.mark.parametrize(
    ("left", "right", "verdict"),
    [
        ("1/3", "0.333333", False),
        ("1,234", "1, 234", None),
        ("(1,234)", "(1234)", None),
        ("2 1/2", "21/2", False),
        ("east", "seat", False),
        ("East", r"\text{east}", True),
        ("xy", "yx", None),
        (r"\frac{-x+1}{2}", r"-\frac{x+1}{2}", None),
        (r"\pi r", r"\pir", None),
        ("52_8", "52_{16}", False),
        ("52_8", "52", None),
        ("x_1", "x_2", None),
        (r"(2,\infty)", r"\left(2,\infty\right]", False),
        (r"(2,\infty)", "x>2", None),
        ("x" * 1001, "5", False),
    ],
)
def test_only_what_needs_no_algebra_is_decided(left: str, right: str, verdict: bool | None):
    assert decide(canonical(left), canonical(right)) is verdict
    assert decide(canonical(right), canonical(left)) is verdict


@pytest.mark.parametrize(
    "text", ["\\boxed{", "{", "}", "answer ", "answer is ", " ", "\\frac{", "1", "1,", "\\text{", "$", ".", "\\"]
)
def test_hostile_repetition_costs_linear_time(text: str):
    hostile = text * (100_000 // len(text))
    started = time.process_time()
    extract_answer(hostile)
    extract_answer("the answer is " + hostile)
    canonical(hostile)
    assert time.process_time() - started < 5  # quadratic would take minutes
