"""Turns: measurements with ``cached``, as a heat map of ratios to BF16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sample_results
from page_document import Document
from sample_results import measurement

from mixquant import results
from mixquant.report import page
from mixquant.report.derived import speedups
from mixquant.report.page import _section


@pytest.fixture(scope="module")
def document() -> Document:
    return Document(page([("turns.json", sample_results.turns())]))


def test_cells_have_their_numbers(document: Document) -> None:
    assert document.text("h3")[0] == "Turns with mixquant: speed to the first token"
    texts = document.text("text")
    shown = [text for text in texts if text.startswith(("0.", "1."))]
    # The first row is the most cached; new tokens grow to the right.
    assert shown == [
        *("0.77", "0.99", "1.22"),
        *("0.81", "1.04", "1.28"),
        *("0.85", "1.10", "1.35"),
        *("0.93", "1.21", "1.49"),
    ]
    # Nothing is quantized at 64 tokens.
    assert [text for text in texts if text.startswith("(")] == [
        *("(0.90)", "(0.95)", "(1.00)", "(1.10)")
    ]


def test_all_below_1_are_red_and_bold() -> None:
    text = page([(None, sample_results.turns())])
    figure = text[text.index("<svg") : text.index("</svg>")]
    assert figure.count("fill: var(--loss)") == 7  # those in brackets as well
    assert figure.count("fill: var(--gain)") == 7  # of those not in brackets
    assert figure.count("font-weight: 700") == 7


def test_words(document: Document) -> None:
    section = _section(sample_results.turns())
    assert (
        "answers sooner than with BF16 in 7 of 16 kinds of turns, later in 6, and with no clear "
        "difference in 3. It quantized nothing in 4 of them, which do not count as sooner. Slowest "
        "against BF16: 0.77 times as fast at 256 new tokens behind 98,304 cached ones."
        in section.verdict
    )
    (panel,) = section.panels
    assert (
        "BF16's time to the first token divided by that of mixquant. Below 1 (red, bold) mixquant is "
        "slower. That is so in 7 of 16 cells. In brackets: mixquant "
        "quantized nothing there." in panel.meaning
    )
    (note,) = section.notes
    assert note.startswith("mixquant quantized no prompt token for turns of 64 new tokens: fewer")


def test_tables_hold_all_values(document: Document) -> None:
    cells = document.text("td")
    assert "1.49×" in cells
    assert "(1.10×)" in cells
    assert "11.6 (11.5 to 11.7)" in cells  # BF16, 64 new tokens and none cached


def test_turns_stand_apart_from_prompts() -> None:
    whole = sample_results.bench()
    both = whole.model_copy(update={"results": whole.results + sample_results.turns().results})
    section = _section(both)
    titles = [panel.title for panel in _section(whole).panels]
    assert [panel.title for panel in section.panels[1:]] == titles
    assert "kinds of turns" in section.verdict
    assert "Prefill of model with mixquant is 1.60 times" in section.verdict


def test_one_turn_and_no_baseline() -> None:
    one = [measurement(arm, "ttft", ms, cached=0) for arm, ms in (("bf16", 2.0), ("mixquant", 1.0))]
    changed = sample_results.turns().model_copy(update={"results": tuple(one)})
    assert "1 of 1 kinds of turns" in page([(None, changed)])
    alone = sample_results.turns().model_copy(update={"results": tuple(one[1:])})
    assert Document(page([(None, alone)])).all("svg") == []


def test_only_turns_with_as_many_cached_tokens_are_compared() -> None:
    base, own = measurement("bf16", "ttft", 2.0, cached=0), measurement("mixquant", "ttft", 1.0)
    assert speedups([base, own]) == ()
    assert speedups([base, own.model_copy(update={"cached": 512})]) == ()
    assert len(speedups([base, own.model_copy(update={"cached": 0})])) == 1


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (1.021, "sooner than with BF16 in 1 of 1 kinds of turns, later in 0,"),
        (1.015, "sooner than with BF16 in 0 of 1 kinds of turns, later in 0,"),
        (0.993, "sooner than with BF16 in 0 of 1 kinds of turns, later in 0,"),
        (0.979, "sooner than with BF16 in 0 of 1 kinds of turns, later in 1,"),
    ],
)
def test_a_difference_below_two_percent_is_none(ratio: float, said: str) -> None:
    found = [
        measurement(arm, "ttft", ms, cached=0) for arm, ms in (("bf16", ratio), ("mixquant", 1))
    ]
    changed = sample_results.turns().model_copy(update={"results": tuple(found)})
    assert said in _section(changed).verdict


def test_where_nothing_was_quantized_there_is_no_verdict() -> None:
    sample = sample_results.turns()
    found = tuple(m for m in sample.results if m.tokens == 64)
    section = _section(sample.model_copy(update={"results": found}))
    assert (section.verdict, section.panels) == ("", ())


class TestFile:
    def test_round_trip(self, tmp_path: Path) -> None:
        file = tmp_path / "turns.json"
        file.write_text(results.to_json(sample_results.turns()))
        assert results.read(file) == sample_results.turns()
        assert json.loads(file.read_text())["results"][0]["cached"] == 0

    def test_files_without_turns_have_no_such_field(self) -> None:
        text = results.to_json(sample_results.bench())
        assert '"cached":' not in text

    def test_no_negative_count(self, tmp_path: Path) -> None:
        file = tmp_path / "turns.json"
        text = results.to_json(sample_results.turns())
        file.write_text(text.replace('"cached": 8192', '"cached": -1'))
        with pytest.raises(results.ResultsError, match=r"results\.\d+\.cached"):
            results.read(file)
