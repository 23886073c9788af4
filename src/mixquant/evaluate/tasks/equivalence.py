"""Whether two mathematical answers are the same: what the worker processes do.

The comparison is Math-Verify's, which evalscope and lm-eval use as well. Before it stand only
spellings that it does not know.
"""

from __future__ import annotations

import logging
import re
from typing import Any

# From here on an answer is not one: AIME's, MATH's and GSM8K's have tens of characters.
LONGEST_ANSWER = 1000
_PATIENCE = 3  # seconds of one step, where an alarm can interrupt it
_TAIL = 3000  # characters of prose that are searched for an answer without a box

_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mbox|mathbf|operatorname)\s*\{([^{}]*)\}"
)
_MIXED = re.compile(r"(?<![\d.,/])(\d{1,6}) (\d{1,6})/(\d{1,6})(?![\d.,/])")
_REPEATING = re.compile(r"(?<![\d.])(\d{0,9})\.(\d{0,9})\\overline\s*\{?(\d{1,9})\}?")


def equivalent(reference: str, answer: str) -> bool:
    """Whether a boxed answer says what the reference says."""
    if len(answer) > LONGEST_ANSWER:
        return False
    if _plain(reference) == _plain(answer) != "":
        return True
    return _same(_parse(_box(reference)), _parse(_box(answer)))


def concludes(reference: str, text: str) -> bool:
    """Whether an answer in prose, without a box, ends with what the reference says."""
    return _same(_parse(_box(reference)), _parse(text[-_TAIL:]))


def _same(reference: list[Any], answer: list[Any]) -> bool:
    from math_verify import verify

    # Sets may be given as inequalities: x <= 2 for (-oo, 2].
    return bool(answer) and verify(
        reference, answer, allow_set_relation_comp=True, timeout_seconds=_PATIENCE
    )


def _parse(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    box_first = LatexExtractionConfig(boxed_match_priority=0)
    how = [box_first, ExprExtractionConfig()]
    return list(parse(text, extraction_config=how, parsing_timeout=_PATIENCE))


def _box(answer: str) -> str:
    return f"\\boxed{{{_respelled(answer)}}}"


def _respelled(answer: str) -> str:
    answer = answer.strip().strip("$").strip()
    answer = answer.removesuffix(".").replace("°", r"^\circ").replace(r"\varnothing", r"\emptyset")
    answer = _MIXED.sub(r"\1\\frac{\2}{\3}", answer)
    return _REPEATING.sub(_fraction, answer)


def _fraction(match: re.Match[str]) -> str:
    """A repeating decimal as a fraction: 0.1\\overline{6} is 15/90."""
    whole, fixed, repeated = match.groups()
    numerator = int(whole + fixed + repeated) - int(whole + fixed or "0")
    return rf"\frac{{{numerator}}}{{{'9' * len(repeated) + '0' * len(fixed)}}}"


def _plain(answer: str) -> str:
    """A spelling without layout, for answers that are words: names, dates, letters."""
    answer = _TEXT.sub(r"\1", _respelled(answer))
    answer = re.sub(r"\\(?:left|right|[,!;: ])|\$", "", answer)
    answer = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer)  # 12 3 is not 123
    answer = answer.removeprefix("(").removesuffix(")")
    return answer.casefold() if len(answer) > 2 else answer  # x is not X
