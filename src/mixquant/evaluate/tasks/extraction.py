"""What an answer says in the end: without its thinking, the last box, the chosen letter.

Everything here takes time in proportion to the text's length, whatever the text.
"""

from __future__ import annotations

import re

_BRACES = re.compile(r"(\\(?:boxed|fbox)[ \t\n]*\{)|\\.|(\{)|\}", re.DOTALL)

# A letter as answers set it: bare, in brackets, bold or in LaTeX, and not the beginning of a word.
# Small letters count only in brackets: "the answer is a matter of taste".
_SETTING = r"(?:[\s\"'*_$(\[{]|\\[a-z]*)*"
_LETTER = (
    rf"{_SETTING}(?:(?:option|choice)\b{_SETTING})?(?:([A-D])(?![\w'’-])|(?<=[(\[])([a-d])[)\]])"
)
_CHOICES = [
    # The format that was asked for, then what else announces an answer.
    re.compile(rf"(?i:correct\s+answer\s+is)\s*:?{_LETTER}"),
    re.compile(
        r"(?i:\banswer|\bcorrect\s+(?:option|choice)|答案)[*_]*\s*"
        rf"(?i:is|would\s+be|should\s+be|must\s+be|:|：|是|为)\s*:?{_LETTER}"
    ),
    re.compile(rf"\\boxed[ \t]*\{{{_LETTER}"),
    re.compile(r"^[ \t\"'*_$(\[{]*([A-D])[ \t\"'*_$)\]}.:,]*$()", re.MULTILINE),
    re.compile(r"\A[\s*_(\[]*([A-D])[)\].:]()"),
]


def strip_thinking(text: str) -> str:
    """What is left without the thoughts between ``<think>`` and ``</think>``.

    A thought that never ends leaves only what stood before it; one whose beginning is missing
    (chat templates may write it into the prompt) ends at the last ``</think>``.
    """
    kept = []
    position = 0
    while (begin := text.find("<think>", position)) >= 0:
        kept.append(text[position:begin])
        end = text.find("</think>", begin)
        if end < 0:
            position = len(text)
            break
        position = end + len("</think>")
    kept.append(text[position:])
    return "".join(kept).rpartition("</think>")[2].strip()


def last_boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` that is closed; None if there is none."""
    found = None
    open_braces: list[int | None] = []  # where a box's content begins; None for other braces
    for match in _BRACES.finditer(text):
        if match[1]:
            open_braces.append(match.end())
        elif match[2]:
            open_braces.append(None)
        elif match[0] == "}" and open_braces:
            begin = open_braces.pop()
            if begin is not None:
                found = text[begin : match.start()].strip()
    return found


def chosen_letter(text: str) -> str | None:
    """The letter, A to D, that an answer to a multiple-choice question settles on; None if none.

    Looked for in this order, the last occurrence of each: "correct answer is (X)", "answer: X" and
    the like, a box, a line that is only a letter; then a letter that opens the text, as in "B. ...".
    """
    for pattern in _CHOICES:
        found = pattern.findall(text)
        if found:
            return "".join(found[-1]).upper()
    return None
