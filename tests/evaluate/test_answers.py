"""Answers are found in every form that models write them in, judged right, and missing ones are said to be missing."""

import pytest

from nestling.evaluate.answers import boxed, chosen, code_block, final, judge_choice, judge_math

MATH = [
    (r"\frac{1}{2}", r"So \boxed{\dfrac12}.", True),
    (r"\frac{1}{2}", r"\boxed{0.5}", True),
    ("72", r"\boxed{072}", True),
    ("1,234", r"\boxed{1234}", True),
    ("1234", r"\boxed{1{,}234}", True),
    ("50\\%", r"\boxed{0.5}", True),
    ("5", r"\boxed{x = 5}", True),
    ("5", r"\boxed{5\text{ cm}}", True),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", True),
    ("[0,1)", r"\boxed{[0, 1)}", True),
    ("[0,1)", r"\boxed{[0, 1]}", False),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", True),
    (r"\text{Evelyn}", r"\boxed{\text{Briana}}", False),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", True),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", True),
    ("p - q", r"\boxed{p-q}", True),
    ("70", r"First \boxed{3}, no: \boxed{70}", True),
    ("3", r"First \boxed{3}, no: \boxed{70}", False),
    ("10", "The answer is 10.", True),
    ("10", "Answer: $10$", True),
    ("10", "I get 12, and then 10 of them are left. The answer is 12.", False),
    (r"\frac{3}{4}", r"\boxed{\frac{3}{4}}\boxed{", True),
    ("10", "The answer is 10. I took 3 steps.", True),
    ("204", r"The total is \fbox{204} minutes", True),
]


@pytest.mark.parametrize(("expected", "text", "right"), MATH)
def test_mathematics_is_judged_by_its_value(expected: str, text: str, right: bool) -> None:
    pytest.importorskip("math_verify")
    verdict = judge_math(text, expected)
    assert (verdict.score == 1) == right
    assert verdict.answer is not None


@pytest.mark.parametrize("text", ["", "I do not know.", r"\boxed{", r"\boxed{}", "well, no number at all"])
def test_no_answer_is_no_answer(text: str) -> None:
    pytest.importorskip("math_verify")
    verdict = judge_math(text, "10")
    assert (verdict.answer, verdict.score) == (None, 0)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{C}", "C"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"\boxed{\textbf{B. } 7}", "B"),
        ("Answer: D", "D"),
        ("**Answer: D**", "D"),
        ("**Answer:** (D)", "D"),
        ("The correct answer is (B).", "B"),
        ("the answer is B, not A", "B"),
        ("A seems right, yet the final answer is C", "C"),
        ("Answer: A\nwait\nAnswer: B", "B"),
        ("reasoning\n\nC", "C"),
        ("reasoning\n(C).", "C"),
        ("A metal is heavy", None),
        ("Answer: Any of them", None),
        ("Answer: E", None),
        (r"\boxed{42}", None),
        ("", None),
    ],
)
def test_the_letter_that_a_text_settles_on(text: str, letter: str | None) -> None:
    assert chosen(text, "ABCD") == letter
    verdict = judge_choice(text, "C", "ABCD")
    assert (verdict.answer, verdict.score) == (letter, float(letter == "C"))


def test_reasoning_is_not_the_answer() -> None:
    assert final("<think>maybe 3</think>It is 4") == "It is 4"
    assert final("maybe 3</think>It is 4", thinking=True) == "It is 4"
    assert final("maybe 3, it never ends", thinking=True) is None
    assert final("<think>it never ends") is None
    assert final("plain") == "plain"


def test_the_last_box_and_the_last_python_block() -> None:
    assert boxed(r"\boxed{1} \boxed{\frac{a}{b}} end") == r"\frac{a}{b}"
    assert boxed(r"\boxed{\left\{ 1 \right\}}") == r"\left\{ 1 \right\}"
    assert boxed("none") is None
    text = "```python\nfirst\n```\nthen\n```python\nsecond\n```\n```\noutput\n```\n```json\n{}\n```"
    assert code_block(text) == "second\n"
    assert code_block("```cpp\nint\n```") == "int\n"
    assert code_block("no code") is None
