"""`mixquant report`: what it reads, what it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sample_results
from page_document import Document
from paths import RESULTS

from mixquant import cli, results
from mixquant.report import page

H200 = RESULTS / "h200.json"
SAMPLES: list[Any] = [
    sample_results.bench,
    sample_results.fidelity,
    sample_results.evaluation,
    sample_results.comparison,
    sample_results.tuning,
]


class TestCommand:
    def test_one_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "page.html"
        assert cli.main(["report", str(H200), "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"wrote {out}\n"
        assert out.read_text() == page([("h200.json", results.read(H200))])
        assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]

    @pytest.mark.slow
    def test_several_files_make_one_page(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for make in SAMPLES:
            Path(f"{make.__name__}.json").write_text(results.to_json(make()))
        assert cli.main(["report", *(f"{make.__name__}.json" for make in SAMPLES)]) == 0
        text = Path("report.html").read_text()
        assert text == page([(f"{make.__name__}.json", make()) for make in SAMPLES])
        headings = Document(text).text("h2")
        assert headings == [
            "Speed",
            "Fidelity",
            "Benchmark scores",
            "Comparison in three arms",
            "Tuning",
        ]

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("{", "is not JSON: line 1"),
            ('{"kind": "bench", "kind": "bench"}', "the key 'kind' appears twice"),
            ("", "is not JSON: line 1"),
            ("[]", "not a results file"),
            ("{}", "field 'kind'"),
            ('{"kind": "else"}', "field 'kind' must be bench, fidelity, evaluation, comparison"),
            ('{"kind": "bench"}', "field 'environment'"),
            (
                results.to_json(sample_results.bench()).replace('"value": 50.0', '"value": "fast"'),
                "field 'results.0.value'",
            ),
            (
                results.to_json(sample_results.bench()).replace('"value": 50.0', '"value": NaN'),
                "holds NaN",
            ),
            (
                results.to_json(sample_results.fidelity()).replace('"bits"', '"bit"'),
                "field 'costs.0.bits'",
            ),
        ],
    )
    def test_unusable_files(
        self, content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file, out = tmp_path / "results.json", tmp_path / "page.html"
        file.write_text(content)
        assert cli.main(["report", str(H200), str(file), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert says in error
        assert "results.json" in error
        assert not out.exists()

    def test_unusable_paths(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        binary = tmp_path / "binary"
        binary.write_bytes(b"\x89PNG\xff")
        good, out = str(H200), str(tmp_path / "page.html")
        for arguments, says in (
            ([], "FILE"),
            (["/no/file"], "cannot read /no/file"),
            ([str(tmp_path)], "cannot read"),
            ([str(binary)], "not UTF-8"),
            ([good, "--out", "/no/directory/x.html"], "cannot write"),
            ([good, "--out", str(tmp_path)], "it is a directory"),
        ):
            options = [] if "--out" in arguments else ["--out", out]
            assert cli.main(["report", *arguments, *options]) == 2
            printed = capsys.readouterr()
            assert printed.out == ""
            assert printed.err.count("\n") == 1
            assert says in printed.err
        assert [entry.name for entry in tmp_path.iterdir()] == ["binary"]
