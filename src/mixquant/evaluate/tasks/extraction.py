"""What an answer says at its end: without its thinking, the last box, or the chosen letter.

Every function takes time in proportion to the length of the text, for any text.
"""

from __future__ import annotations

import re

THOUGHTS = (("<think>", "</think>"), ("<|channel>thought", "<channel|>"))
"""How models mark the beginning and the end of a thought: Qwen, DeepSeek and others; Gemma 4."""

_BRACES = re.compile(r"(\\(?:boxed|fbox)[ \t\n]*\{)|\\.|(\{)|\}", re.DOTALL)

# What writers of Chinese and Japanese type: ！ to ～ are ASCII's, each as wide as a character of theirs.
_FULL_WIDTH = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | {0x3000: " "}

# A letter as answers set it: bare, in brackets, in quotes, bold or in LaTeX, and not the beginning of
# a word. Small letters count only in brackets: "the answer is a matter of taste".
_OPEN = r"\"'“”‘’„«»‹›「『`*_$(\[{"
_CLOSE = r"\"'“”‘’«»‹›」』`*_$)\]}"
_SETTING = rf"(?:[\s{_OPEN}]|\\[a-z]*)*"
_WORD = r"(?i:option|choice|选项)"
_BARE = r"([A-D])(?![\w'’-])"
_LETTER = rf"{_SETTING}(?:{_WORD}(?![a-z]){_SETTING})?(?:{_BARE}|(?<=[(\[])([a-d])[)\]])"
_CHOICES = [
    # The requested format, then other phrases that announce an answer.
    re.compile(rf"(?i:correct\s+answer\s+is)\s*:?{_LETTER}"),
    re.compile(
        r"(?i:\banswer|\bcorrect\s+(?:option|choice)|\b(?:my|final)\s+choice|答案)[*_]*\s*"
        rf"(?i:is|would\s+be|should\s+be|must\s+be|:|是|为)\s*:?{_LETTER}"
    ),
    re.compile(rf"\\boxed[ \t]*\{{{_LETTER}"),
    re.compile(
        rf"(?:\b(?i:I\s+(?:would\s+)?(?:choose|pick|select|go\s+with))|选择?)\s*:?{_LETTER}"
    ),
    re.compile(
        rf"(?<![\w'’-]){_BARE}[{_CLOSE}]*\s+(?i:is\s+(?:the\s+)?(?:correct|right|best))\b()"
    ),
    re.compile(
        rf"^[ \t{_OPEN}]*(?:(?:{_WORD}|(?i:answer))[ \t{_OPEN}:]*)?([A-D])[ \t{_CLOSE}.:,。]*$()",
        re.MULTILINE,
    ),
    re.compile(rf"\A[\s{_OPEN}]*([A-D])[)\].:]()"),
    re.compile(rf"\A[\s{_OPEN}]*{_WORD}[ \t{_OPEN}]*{_BARE}()"),
]


def strip_thinking(text: str) -> str:
    """What is left without the thoughts between ``<think>`` and ``</think>``, and without Gemma 4's
    between ``<|channel>thought`` and ``<channel|>``.

    A thought that never ends leaves only what stood before it; one whose beginning is missing
    (chat templates may write it into the prompt) ends at the last mark of an end.
    """
    for begin, end in THOUGHTS:
        text = _without(text, begin, end)
    return text.strip()


def _without(text: str, begin: str, end: str) -> str:
    kept = []
    position = 0
    while (start := text.find(begin, position)) >= 0:
        kept.append(text[position:start])
        close = text.find(end, start)
        if close < 0:
            position = len(text)
            break
        position = close + len(end)
    kept.append(text[position:])
    return "".join(kept).rpartition(end)[2]


def ascii_forms(text: str) -> str:
    """The text with full-width letters, digits and signs as ASCII has them."""
    return text.translate(_FULL_WIDTH)


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
    the like, a box, "I choose X", "X is correct", a line that is only a letter or "Option X"; then
    what opens the text, as in "B. ..." or "Option B, since ...". Full-width forms are read, too.
    """
    text = ascii_forms(text)
    for pattern in _CHOICES:
        found = pattern.findall(text)
        if found:
            return "".join(found[-1]).upper()
    return None
