"""Progress where output is redirected: a line now and then, and none for what is quick."""

from __future__ import annotations

import time

import pytest

from mixquant.cli import progress as shown


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "SECONDS_TO_FIRST_LINE", 0.05)
    monkeypatch.setattr(shown, "SECONDS_BETWEEN_LINES", 0.2)


def wait_for(text: str, capsys: pytest.CaptureFixture[str]) -> str:
    said, end = "", time.monotonic() + 20
    while text not in said and time.monotonic() < end:
        said += capsys.readouterr().err
        time.sleep(0.02)
    return said


def test_lines_tell_the_latest_in_intervals(
    impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with shown.progress_bar() as progress:
        for share in range(100):
            progress("Loading", share / 1000)
        assert "Loading (10%), 0 s so far" in wait_for("Loading", capsys)
        progress("Calibrating, 3 of 16", 0.25)
        said = wait_for("Calibrating", capsys)
        assert "Calibrating, 3 of 16 (25%), " in said
        assert said.count("\n") < 10
    time.sleep(0.5)
    assert capsys.readouterr().err == ""  # it ended with its block


def test_what_is_quick_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with shown.progress_bar() as progress:
        progress("Loading", 0.0)
    assert time.monotonic() - start < 2
    assert capsys.readouterr().err == ""


def test_evaluate_counts_answers(impatient: None, capsys: pytest.CaptureFixture[str]) -> None:
    with shown.answer_progress() as progress:
        progress.total(3)
        progress.doing("bf16: gsm8k")
        progress.advance()
        assert "bf16: gsm8k (1 of 3 answers), " in wait_for("(1 of 3 answers)", capsys)
