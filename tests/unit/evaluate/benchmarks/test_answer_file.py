"""Nothing that is finished is lost, wherever a kill tears the file."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixquant.evaluate.benchmarks.answer_file import (
    AnswerFile,
    AnswerFileError,
    Entry,
    first_difference,
)
from mixquant.evaluate.benchmarks.chat import Usage
from mixquant.evaluate.tasks import Verdict

CONFIGURATION = {"model": "m", "settings": {"temperature": 0.6, "top_k": 20}}
RIGHT = Verdict(1.0, "as expected")
AWKWARD = "zwei\nZeilen, \u2028 and \r, \U0001f600, \x00"


def entry(text: str = "4", verdict: Verdict | None = RIGHT, judge: str | None = None) -> Entry:
    return Entry({"text": text}, Usage(1, 7, 3, 0.5), verdict=verdict, judge=judge)


def begun(path: Path) -> AnswerFile:
    file = AnswerFile(path, CONFIGURATION)
    file.add(("a", 0), entry())
    file.add(("a", 1), Entry(None, Usage(9), error="HTTP 500"))
    file.add((AWKWARD, 0), entry(AWKWARD))
    file.add(("b", 0), entry(verdict=None))
    file.add(("b", 0), entry(judge="j"))
    file.close()
    return file


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "not there yet" / "arm.jsonl"
    assert AnswerFile(path, CONFIGURATION).entries == {}
    assert not path.exists()  # before there is an answer
    written = begun(path)
    assert AnswerFile(path, CONFIGURATION).entries == written.entries


def test_a_failure_gives_way_to_an_answer_and_a_verdict_joins_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "arm.jsonl"
    file = begun(path)
    file.add(("a", 1), entry("5"))
    file.close()
    entries = AnswerFile(path, CONFIGURATION).entries
    assert entries["a", 1] == entry("5")
    assert entries["b", 0] == entry(judge="j")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum(line.get("item") == "b" and "answer" in line for line in lines) == 1


@settings(deadline=None)
@given(st.data())
def test_a_file_torn_anywhere_keeps_its_whole_lines_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("torn") / "arm.jsonl"
    begun(path)
    whole = path.read_bytes()
    kept = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:kept])
    expected = [json.loads(line) for line in whole[:kept].split(b"\n")[:-1]][1:]

    file = AnswerFile(path, CONFIGURATION)
    assert set(file.entries) == {(line["item"], line["seed"]) for line in expected}
    file.add(("new", 7), entry("new"))
    file.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["configuration"] == CONFIGURATION
    assert lines[1:-1] == expected
    assert AnswerFile(path, CONFIGURATION).entries[("new", 7)] == entry("new")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": "n"}, 'model was "m", and is "n"'),
        (
            {"settings": {"temperature": 0.7, "top_k": 1}},
            "settings.temperature was 0.6, and is 0.7",
        ),
        ({"settings": {"temperature": 0.6, "top_k": 1}}, "settings.top_k was 20, and is 1"),
        ({"arm": None, "items": "x"}, 'items was null, and is "x"'),
    ],
)
def test_another_configuration_is_refused_by_its_first_difference(
    tmp_path: Path, changed: dict[str, object], says: str
) -> None:
    path = tmp_path / "arm.jsonl"
    begun(path)
    before = path.read_bytes()
    with pytest.raises(AnswerFileError) as caught:
        AnswerFile(path, {**CONFIGURATION, **changed})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_no_difference_is_none() -> None:
    assert first_difference(CONFIGURATION, json.loads(json.dumps(CONFIGURATION))) is None
    assert first_difference({"a": 1}, {}) == "a was 1, and is null"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]\n", "line 1 is not a JSON object"),
        ('{"kind": "bench"}\n', "is not a file of answers"),
        ('{"mixquant": "answers", "version": 99}\n', "is not a file of answers"),
        ("{header}\n{\n", "line 2 is not a JSON object"),
        ('{header}\n{"item": "a"}\n', "damaged: line 2"),
        ('{header}\n{"item": "a", "seed": 0, "error": null}\n', "damaged: line 2"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    header = {"mixquant": "answers", "version": 1, "configuration": CONFIGURATION}
    path = tmp_path / "arm.jsonl"
    path.write_text(text.replace("{header}", json.dumps(header)))
    with pytest.raises(AnswerFileError, match=says):
        AnswerFile(path, CONFIGURATION)


def test_a_disk_that_takes_no_more_is_one_line_and_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "arm.jsonl"
    begun(path)
    file = AnswerFile(path, CONFIGURATION)
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        with pytest.raises(AnswerFileError, match=r"cannot write .*: File too large") as caught:
            file.add(("c", 0), entry())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert "\n" not in str(caught.value)
    file.add(("d", 0), entry())  # there is room again
    expected = {**begun(tmp_path / "other").entries, ("d", 0): entry()}
    assert AnswerFile(path, CONFIGURATION).entries == file.entries == expected
