"""The page as text: what it holds, from which files, and that nothing in it leads outside."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sample_results
from example_counts import up_to
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import RESULTS
from sample_results import measurement

from mixquant import cli, results
from mixquant.report import page
from mixquant.report.derived import pareto_front, speedups
from mixquant.report.evaluation import mean_scores

H200 = RESULTS / "h200.json"
SAMPLES: list[Any] = [
    sample_results.bench,
    sample_results.fidelity,
    sample_results.evaluation,
    sample_results.comparison,
]


class Document(HTMLParser):
    """A page's elements, as far as the tests ask for them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # of an element of which kind
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


@cache
def everything() -> str:
    return page([(f"{make.__name__}.json", make()) for make in SAMPLES])


class TestSpeedups:
    def test_times_and_rates(self) -> None:
        found = speedups(
            [
                measurement("bf16", "ttft", 200.0),
                measurement("mixquant", "ttft", 160.0),
                measurement("bf16", "prefill", 200.0, unit="tok/s"),
                measurement("mixquant", "prefill", 160.0, unit="tok/s"),
            ]
        )
        assert [(s.arm, s.ratio) for s in found] == [("mixquant", 1.25), ("mixquant", 0.8)]

    @pytest.mark.parametrize(
        "other",
        [
            {"tokens": 4096},
            {"concurrency": 2},
            {"workload": "batch"},
            {"unit": "s"},
            {"metric": "tpot"},
        ],
    )
    def test_only_of_the_same_condition(self, other: dict[str, Any]) -> None:
        fields = {"metric": "ttft", **other}
        metric = fields.pop("metric")
        own = measurement("mixquant", metric, 160.0, **fields)
        assert speedups([measurement("bf16", "ttft", 200.0), own]) == ()

    def test_agent_traces_of_different_length(self) -> None:
        # The answers are part of the next prompt: the arms' mean lengths differ.
        trace = {"workload": "agent", "unit": "ms"}
        (found,) = speedups(
            [
                measurement("bf16", "ttft", 30.0, tokens=3000, **trace),
                measurement("mixquant", "ttft", 20.0, tokens=3010, **trace),
            ]
        )
        assert found.ratio == 1.5

    def test_shares_and_zeros_have_none(self) -> None:
        for unit, value in (("share", 0.5), ("ms", 0.0)):
            base, own = (
                measurement(arm, "quantized", value, unit=unit) for arm in ("bf16", "mixquant")
            )
            assert speedups([base, own]) == ()

    @given(
        base=st.tuples(*[st.floats(1, 1e4)] * 3).map(sorted),
        own=st.tuples(*[st.floats(1, 1e4)] * 3).map(sorted),
        unit=st.sampled_from(["ms", "tok/s"]),
    )
    def test_bounds_hold_every_pair_of_runs(
        self, base: list[float], own: list[float], unit: str
    ) -> None:
        (found,) = speedups(
            measurement(arm, "x", run[1], lowest=run[0], highest=run[2], unit=unit)
            for arm, run in (("bf16", base), ("mixquant", own))
        )
        assert found.low is not None and found.high is not None
        for a in base:
            for b in own:
                ratio = b / a if unit == "tok/s" else a / b
                assert found.low <= ratio * (1 + 1e-9)
                assert found.high >= ratio * (1 - 1e-9)
        assert found.low <= found.ratio <= found.high

    def test_no_bounds_without_spread(self) -> None:
        (found,) = speedups(
            [measurement("bf16", "ttft", 2.0, lowest=1.0), measurement("mixquant", "ttft", 1.0)]
        )
        assert (found.low, found.high) == (None, None)


coordinates = st.lists(
    st.tuples(*[st.integers(0, 8).map(float) | st.floats(0, 8)] * 2), max_size=20
)


class TestParetoFront:
    def test_by_hand(self) -> None:
        points = [(16, 0), (8, 3), (4, 9), (8, 4), (5, 9)]
        assert pareto_front([(float(a), float(b)) for a, b in points]) == [2, 1, 0]

    @given(coordinates)
    def test_definition(self, points: list[tuple[float, float]]) -> None:
        def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
            return a[0] <= b[0] and a[1] <= b[1] and a != b

        front = pareto_front(points)
        assert bool(front) == bool(points)
        for i in front:
            assert not any(beats(other, points[i]) for other in points)
        for i in set(range(len(points))) - set(front):
            assert any(beats(points[j], points[i]) for j in front)

    @given(coordinates)
    def test_falls_from_left_to_right(self, points: list[tuple[float, float]]) -> None:
        front = [points[i] for i in pareto_front(points)]
        assert front == sorted(front)
        assert [y for _, y in front] == sorted((y for _, y in front), reverse=True)

    @given(coordinates, st.randoms())
    def test_order_does_not_matter(self, points: list[tuple[float, float]], random: Any) -> None:
        shuffled = random.sample(points, len(points))
        assert sorted(points[i] for i in pareto_front(points)) == sorted(
            shuffled[i] for i in pareto_front(shuffled)
        )


def test_mean_scores_are_over_what_all_arms_have() -> None:
    evaluation = sample_results.evaluation()
    without = evaluation.scores[:-1]  # aime25 of mixquant
    means, benchmarks = mean_scores(evaluation.model_copy(update={"scores": without}))
    assert benchmarks == 2
    assert means["bf16"] == pytest.approx((0.912 + 0.428) / 2)
    assert means["mixquant"] == pytest.approx((0.902 + 0.414) / 2)


class TestPage:
    def test_nothing_leads_outside(self) -> None:
        document = Document(everything())
        for tag, attributes in document.tags:
            assert tag not in ("script", "img", "iframe", "object", "embed", "base", "form")
            for name, value in attributes.items():
                if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                    assert value is not None and value.startswith(("#", "data:,"))
                assert not name.startswith("on")
                assert "url(" not in (value or "").replace("url(#", "")
        (style,) = document.text("style")
        assert "@import" not in style
        assert "url(" not in style
        assert "http" not in style

    def test_ids_are_unique_and_references_have_one(self) -> None:
        text = everything()
        ids = re.findall(r'\bid="([^"]+)"', text)
        assert len(ids) == len(set(ids)) > 50
        referred = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)|aria-labelledby="([^"]+)"', text)
        names = {name for groups in referred for group in groups for name in group.split()}
        assert names <= set(ids)
        assert len(names) > 50

    def test_plots_have_alt_text_and_table(self) -> None:
        document = Document(everything())
        plots = document.all("svg")
        assert len(plots) == len(document.all("figure")) == len(document.all("summary")) - 4
        assert all(plot["role"] == "img" for plot in plots)
        descriptions = document.text("desc")
        assert len(descriptions) == len(plots)
        for description in descriptions:
            assert re.search(r"\d", description)
            assert description.endswith(".")
        assert len(document.text("title")) == len(plots) + 1

    def test_same_input_same_page(self) -> None:
        assert everything.__wrapped__() == everything()

    def test_every_figure_is_in_a_table(self) -> None:
        cells = Document(page([("h200.json", results.read(H200))])).text("td")
        assert "51.2 (50.0 to 51.9)" in cells
        assert "1.39× (1.33 to 1.48)" in cells
        assert "1.30× (1.30 to 1.30)" in cells

    def test_findings_of_the_committed_measurement(self) -> None:
        (ttft, tpot, sixteen) = Document(page([("h200.json", results.read(H200))])).text("desc")
        assert "mixquant 1.10× to 1.39×, most at 8,192 tokens" in ttft
        assert "mixquant 0.98× to 0.99×" in tpot
        assert "mixquant 1.30×; fp8 1.44×" in sixteen

    def test_findings(self) -> None:
        said = " ".join(Document(everything()).text("desc"))
        assert (
            "On the Pareto front: fast (4.00 bits, 0.110), balanced (5.20 bits, 0.0450), "
            "mixquant (8.00 bits, 0.0300) and bf16 (16.0 bits, 0); beaten in both: quantized and "
            "with two groups." in said
        )
        assert "mixquant 0.0720 at answer token 1, 0.0129 from token 65 on" in said
        assert "4 of 6 differences are clear of zero: math500, quantized − bf16: −6.4" in said
        assert "math500 84 %, bfcl-v4 67 % and mean 77 %; nothing was lost in aime25" in said
        assert "bf16 210.0 ms, of which 71.4 % linear and 19.0 % attention" in said
        assert "quantized 2.12, 2.32×" in said

    def test_environment_command_and_notes(self) -> None:
        document = Document(everything())
        assert document.text("dd").count("NVIDIA Imaginary") == 4
        assert document.text("dd").count("2.13.0") == 4
        for make in SAMPLES:
            assert make().command in document.text("code")
        (note,) = [text for text in document.text("p") if "count as wrong" in text]
        assert note.startswith("bfcl-v4, quantized: 3 of 1,000 requests")

    def test_emulation_is_said(self) -> None:
        emulated = sample_results.comparison().model_copy(update={"native": False})
        assert "its times say nothing" in page([(None, emulated)])
        assert "its times say nothing" not in page([(None, sample_results.comparison())])

    def test_absent_parts_leave_nothing(self) -> None:
        bench = sample_results.bench().model_copy(update={"results": (), "breakdown": ()})
        fidelity = sample_results.fidelity().model_copy(
            update={"results": (), "costs": (), "texts": ()}
        )
        evaluation = sample_results.evaluation().model_copy(
            update={"scores": (), "differences": (), "recoveries": (), "settings": {}}
        )
        for empty in (bench, fidelity, evaluation):
            document = Document(page([("x.json", empty)]))
            assert document.all("figure") == document.all("table") == []
            assert document.text("h3") == ["Where this was measured"]

    def test_a_recovery_where_nothing_was_lost(self) -> None:
        nothing = (results.Recovery(benchmark="mean", arm="mixquant", recovery=None),)
        changed = sample_results.evaluation().model_copy(update={"recoveries": nothing})
        headings = Document(page([(None, changed)])).text("h3")
        assert not any("Recovery" in heading for heading in headings)

    def test_one_slow_token_does_not_flatten_the_plot(self) -> None:
        runs = [
            measurement(arm, "tpot", value, tokens=tokens, lowest=1.0, highest=high)
            for arm, value in (("bf16", 5.0), ("mixquant", 4.0))
            for tokens, high in ((1000, 900.0), (2000, 6.0))
        ]
        changed = sample_results.bench().model_copy(
            update={"results": tuple(runs), "breakdown": ()}
        )
        document = Document(page([(None, changed)]))
        ticks = [float(t) for t in document.text("text") if re.fullmatch(r"[\d.]+", t)]
        assert max(ticks) < 3
        assert "5.00 (1.00 to 900.0)" in document.text("td")

    def test_nor_one_slow_request_the_bars(self) -> None:
        runs = [
            measurement(arm, "ttft", 400.0, workload="agent", lowest=90.0, highest=90_000.0)
            for arm in ("bf16", "mixquant")
        ]
        changed = sample_results.bench().model_copy(
            update={"results": tuple(runs), "breakdown": ()}
        )
        document = Document(page([(None, changed)]))
        ticks = [
            float(t.replace(",", "")) for t in document.text("text") if re.fullmatch(r"[\d.,]+", t)
        ]
        assert max(ticks) < 2000
        assert "400.0 (90.0 to 90,000)" in document.text("td")

    def test_figures_without_a_plot(self) -> None:
        document = Document(page([(None, sample_results.bench())]))
        assert "More figures" in document.text("summary")
        assert "5.00 (0.100 to 900.0)" in document.text("td")

    def test_without_a_baseline_values_stand_alone(self) -> None:
        own = [m for m in sample_results.bench().results if m.arm != "bf16"]
        changed = sample_results.bench().model_copy(update={"results": tuple(own)})
        document = Document(page([(None, changed)]))
        assert "×" not in " ".join(document.text("desc"))
        assert "27.8 (26.9 to 29.2)" in document.text("td")

    @pytest.mark.parametrize(
        "name",
        [
            "<script>alert(1)</script>",
            "</title></svg><img src=x onerror=alert(1)>",
            "$\\frac{a}$ & co",
            "_nolegend_",
            "quote \" and ' and ]]>",
            "control \x00 \x1b[31m \u2028 line\nline",
            "#0a05fe",
            "{{ 7 * 7 }} {% raw %}",
            "速い",
            "",
        ],
    )
    def test_names_are_only_text(self, name: str) -> None:
        arms = json.dumps(name)
        for make in SAMPLES:
            text = results.to_json(make()).replace('"mixquant"', arms)
            changed = type(make()).model_validate_json(text)
            document = Document(page([(name or None, changed)]))
            assert document.all("script") == document.all("img") == []
            shown = " ".join(name.split())[:20].rstrip()
            labels = [" ".join(text.split()) for _, text in document.texts]
            if name.isprintable():
                assert any(shown in label for label in labels)

    def test_halves_of_surrogate_pairs(self) -> None:
        changed = sample_results.evaluation().model_copy(update={"settings": {"x": "\ud800"}})
        page([(None, changed)]).encode("utf-8")

    def test_without_files(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            page([])

    @settings(max_examples=up_to(25), deadline=None)
    @given(
        values=st.lists(st.floats(0, 1e12, allow_subnormal=False), min_size=3, max_size=3),
        tokens=st.lists(st.integers(0, 2**20), min_size=1, max_size=3, unique=True),
        metric=st.sampled_from([("ttft", "ms"), ("prefill", "tok/s"), ("quantized", "share")]),
        workload=st.sampled_from(["length", "batch", "agent", "something else"]),
    )
    def test_any_measurement_can_be_drawn(
        self, values: list[float], tokens: list[int], metric: tuple[str, str], workload: str
    ) -> None:
        made = tuple(
            measurement(arm, metric[0], value, unit=metric[1], tokens=n, workload=workload)
            for arm, value in zip(("bf16", "mixquant", "other"), values, strict=True)
            for n in tokens
        )
        changed = sample_results.bench().model_copy(update={"results": made, "breakdown": ()})
        document = Document(page([(None, changed)]))
        assert document.all("table")
        assert "nan" not in " ".join(document.text("td"))

    @settings(max_examples=up_to(25), deadline=None)
    @given(st.lists(st.tuples(st.floats(0, 16), st.floats(0, 50)), min_size=1, max_size=12))
    def test_any_fidelity_can_be_drawn(self, points: list[tuple[float, float]]) -> None:
        sample = sample_results.fidelity()
        names = [f"arm {n}" for n in range(len(points))]
        changed = sample.model_copy(
            update={
                "arms": tuple(results.Arm(name=name) for name in names),
                "costs": tuple(
                    results.Cost(arm=name, share={"bf16": 1.0}, bits=bits)
                    for name, (bits, _) in zip(names, points, strict=True)
                ),
                "results": tuple(
                    sample.results[1].model_copy(update={"arm": name, "kl_mean": kl})
                    for name, (_, kl) in zip(names, points, strict=True)
                ),
            }
        )
        document = Document(page([(None, changed)]))
        headings = " ".join(document.text("h3"))
        assert ("Divergence against cost" in headings) == (len(points) > 1)


class TestCommand:
    def test_one_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "page.html"
        assert cli.main(["report", str(H200), "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"wrote {out}\n"
        assert out.read_text() == page([("h200.json", results.read(H200))])
        assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]

    def test_several_files_make_one_page(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for make in SAMPLES:
            Path(f"{make.__name__}.json").write_text(results.to_json(make()))
        assert cli.main(["report", *(f"{make.__name__}.json" for make in SAMPLES)]) == 0
        assert Path("report.html").read_text() == everything()
        headings = Document(everything()).text("h2")
        assert headings == ["Speed", "Fidelity", "Benchmark scores", "Comparison in three arms"]

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("{", "is not JSON: line 1"),
            ('{"kind": "bench", "kind": "bench"}', "the key 'kind' stands twice"),
            ("", "is not JSON: line 1"),
            ("[]", "not a results file"),
            ("{}", "field 'kind'"),
            ('{"kind": "else"}', "field 'kind' must be bench, fidelity, evaluation or comparison"),
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


def test_infinite_values_are_no_json() -> None:
    assert "null" in results.to_json(
        sample_results.bench().model_copy(
            update={"results": (measurement("bf16", "ttft", math.inf),)}
        )
    )
