"""Whether two mathematical answers are equal, as worker processes compute it.

The comparison is Math-Verify's, which evalscope and lm-eval also use. Before it, spellings that it
does not know are rewritten.
"""

from __future__ import annotations

import logging
import re
from decimal import Decimal
from typing import Any

from mixquant.evaluate.tasks.extraction import ascii_forms

# A longer text is not an answer: those of AIME, MATH and GSM8K have tens of characters.
LONGEST_ANSWER = 1000
_PATIENCE = 3  # seconds of one step, where an alarm can interrupt it
_TAIL = 3000  # characters of prose that are searched for an answer without a box

_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mbox|mathbf|operatorname)\s*\{([^{}]*)\}"
)
_MIXED = re.compile(r"(?<![\d.,/])(\d{1,6}) (\d{1,6})/(\d{1,6})(?![\d.,/])")
# A dash that stands for a minus sign: nothing before it to subtract from.
_SIGN = re.compile(r"(?<![\w.)}\]])[–—](?=[$€£]?\\?\$?\.?\d)")
_SCIENTIFIC = re.compile(
    r"(?<![\w.])(\d{1,30}(?:\.\d{1,30})?)"
    r"(?:[eE]|\s?(?:×|x|\*|\\times|\\cdot)\s?10\^)\{?([+-]?\d{1,2})\}?(?![\w.]*\d|\w)"
)
# A number with its unit in words: a word of one letter may be a variable.
_WITH_UNIT = re.compile(
    r"(?:USD\s?|EUR\s?|GBP\s?|[€£¥]\s?)?([-+]?(?:\d[\d,]*)?\.?\d+)\s?"
    r"(?:[€£¥]|[A-Za-z]{2,}(?:[ /][A-Za-z]+)*)?(?:\^\{?[23]\}?)?"
)
_NO_UNITS = re.compile(
    r"\b(?:hundred|thousand|[mbtr]+illion|dozen|half|percent|pi|sqrt|sin|cos|tan|log|ln|exp|mod|"
    r"and|or|to|of|over|plus|minus|times)\b",
    re.IGNORECASE,
)
_REPEATING = re.compile(r"(?<![\d.])(\d{0,9})\.(\d{0,9})\\overline\s*\{?(\d{1,9})\}?")


def equivalent(reference: str, answer: str) -> bool:
    """Whether a boxed answer says what the reference says."""
    if len(answer) > LONGEST_ANSWER:
        return False
    if _plain(reference) == _plain(answer) != "":
        return True
    return _same(_parse(_box(reference)), _parse(_box(answer)))


def concludes(reference: str, text: str) -> bool | None:
    """Whether an answer in prose, without a box, ends with what the reference says; None if it holds
    no expression at all."""
    found = _parse(_typed(text[-_TAIL:]).replace("\\$", "$"))
    return _same(_parse(_box(reference)), found) if found else None


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


def _typed(text: str) -> str:
    """The text as it would be typed in ASCII: minus signs, digits, powers of ten written out."""
    text = _SIGN.sub("-", ascii_forms(text).replace("−", "-").replace("﹣", "-"))
    return _SCIENTIFIC.sub(lambda m: format(Decimal(f"{m[1]}e{m[2]}"), "f"), text)


def _without_unit(answer: str) -> str:
    match = _WITH_UNIT.fullmatch(answer)
    return answer if match is None or _NO_UNITS.search(answer) else match[1]


def _respelled(answer: str) -> str:
    answer = _typed(answer).strip().strip("$").strip()
    answer = (
        _without_unit(answer.removesuffix("."))
        .replace("°", r"^\circ")
        .replace(r"\varnothing", r"\emptyset")
    )
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
