"""What an answer says in the end: thinking stripped, boxes found, letters chosen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixquant.evaluate.tasks.extraction import chosen_letter, last_boxed, strip_thinking

# What the patterns look for, in any order: plain random text would hardly ever reach them.
PIECES = st.lists(
    st.sampled_from(
        ["<think>", "</think>", r"\boxed{", r"\fbox {", "{", "}", "\\", r"\text{", "answer is", ":"]
        + [
            "The correct answer is",
            "(",
            ")",
            "A",
            "B",
            "d",
            " ",
            "\n",
            "**",
            "choice",
            "Option",
            "I choose ",
            "B is correct",
            "“",
            "Ｂ",
            "1",
            "答案：",
        ]
    ),
    max_size=40,
).map("".join)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>\nhm\n</think>\n\n4", "4"),
        ("hm</think>4", "4"),
        ("<think>a</think>1<think>b</think>2", "12"),
        ("4 <think>but maybe", "4"),
        ("<think>never ends", ""),
        ("a</think>b</think>c", "c"),
        ("<|channel>thought\nhm<channel|>\n4", "4"),
        ("<|channel>thought\nhm<channel|>1<|channel>thought no<channel|>2", "12"),
        ("hm<channel|>4", "4"),
        ("4 <|channel>thought but", "4"),
        ("4", "4"),
        ("", ""),
    ],
)
def test_thinking_is_stripped(text: str, left: str) -> None:
    assert strip_thinking(text) == left


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\text{a \boxed{3}}}", r"\text{a \boxed{3}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox {7}", "7"),
        (r"\boxed{5} and then \boxed{6", "5"),
        (r"a stray } and { then \boxed{5}", "5"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        ("no box", None),
        (r"\boxed{", None),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_closed_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("The correct answer is B", "B"),
        ("the correct answer is: **C**", "C"),
        ('"The correct answer is (insert D here)"? The correct answer is (A).', "A"),
        ("The correct answer is (A)... wait. The correct answer is (D)", "D"),
        ("The correct answer is (B), not (C).", "B"),
        (r"The correct answer is $\boxed{C}$", "C"),
        (r"The correct answer is \(\text{B}\).", "B"),
        ("The correct answer is option (C).", "C"),
        ("The correct answer is B) Paris", "B"),
        ("The correct answer is\n\n(D)", "D"),
        ("The correct answer is (c)", "C"),
        ("ANSWER: A", "A"),
        ("**Answer:** B", "B"),
        ("Answer: (C) because D is wrong", "C"),
        ("The answer is D. Option A is wrong.", "D"),
        ("The correct option is B", "B"),
        ("答案：C", "C"),
        (r"so $\boxed{\text{B}}$", "B"),
        ("Some reasoning.\n\n**C**", "C"),
        ("(A)\n", "A"),
        ("B. The second of them", "B"),
        ("A) yes", "A"),
        # In other words, quotes and widths.
        ("Option B", "B"),
        ("Option B.", "B"),
        ("**Option (B)**", "B"),
        ("Choice B", "B"),
        ("Some reasoning.\n\nOption C", "C"),
        ("Option B, since the second of them is named.", "B"),
        ("Answer B", "B"),
        ("My choice: B", "B"),
        ("I choose option B.", "B"),
        ("I would go with (B).", "B"),
        ("Option B is correct. Option C is not.", "B"),
        ("C is wrong, so B is the right one.", "B"),
        ("“B”", "B"),
        ("‘B’.", "B"),
        ("«B»", "B"),
        ("「B」", "B"),
        ("The correct answer is “B”.", "B"),
        ("The correct answer is `B`", "B"),
        ("The correct answer is Ｂ", "B"),
        ("The correct answer is （Ｂ）.", "B"),
        ("Ｂ", "B"),
        ("答案：Ｂ", "B"),
        ("答案是选项B", "B"),
        ("所以选B。", "B"),
        ("选择：Ｂ", "B"),
        ("Ｂ．第二个", "B"),
        # None of these settles on a letter.
        ("", None),
        ("The correct answer is unclear to me.", None),
        ("The answer is a matter of taste.", None),
        ("The answer is Athens", None),
        ("The answer is D-Day", None),
        ("A good question with B and C in it", None),
        ("The correct answer is not known", None),
        ("The correct answer is (E).", None),
        ("Option Bravo", None),
        ("Options B and C are close.", None),
        ("optional", None),
        ("I choose a careful approach", None),
        ("B is not correct", None),
        ("“Better” is a word", None),
    ],
)
def test_the_chosen_letter(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


@given(PIECES | st.text())
def test_whatever_the_text_nothing_is_raised(text: str) -> None:
    assert "<think>" not in strip_thinking(text)
    content = last_boxed(text)
    assert content is None or content in text
    assert chosen_letter(text) in ("A", "B", "C", "D", None)


@given(thought=st.text(), answer=st.text().map(str.strip))
def test_what_follows_a_thought_is_kept(thought: str, answer: str) -> None:
    thought = thought.replace("think>", "")
    answer = answer.replace("think>", "").strip()
    assert strip_thinking(f"<think>{thought}</think>{answer}") == answer
