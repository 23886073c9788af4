"""The page as text: what it holds, from which files, and that nothing in it leads outside."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import sample_results
from example_counts import up_to
from hypothesis import given, settings
from hypothesis import strategies as st
from page_document import Document
from paths import RESULTS
from sample_results import measurement

from mixquant import results
from mixquant.report import page

H200 = RESULTS / "h200.json"
SAMPLES: list[Any] = [
    sample_results.bench,
    sample_results.fidelity,
    sample_results.evaluation,
    sample_results.comparison,
    sample_results.tuning,
]


@cache
def everything() -> str:
    return page([(f"{make.__name__}.json", make()) for make in SAMPLES])


def renamed(value: Any, names: tuple[str, str]) -> Any:
    """A results file with other names for two of its arms."""
    new = dict(zip(("mixquant", "quantized"), names, strict=True))
    if isinstance(value, list):
        return [renamed(one, names) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: new.get(one, one) if key in ("arm", "name") else renamed(one, names)
        for key, one in value.items()
    }


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
        assert len(plots) == len(document.all("figure")) == len(document.all("summary")) - 5
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
        assert "mixquant 1.10× to 1.39×, most at 8,192 prompt tokens" in ttft
        assert "mixquant 0.98× to 0.99×" in tpot
        assert "mixquant 1.30×; fp8 1.44×" in sixteen

    def test_findings(self) -> None:
        said = " ".join(Document(everything()).text("desc"))
        assert (
            "On the Pareto front: fast (4.00 bits, 0.110), balanced (5.20 bits, 0.0450), "
            "mixquant (8.00 bits, 0.0300) and bf16 (16.0 bits, 0); beaten: quantized and "
            "with two groups." in said
        )
        assert "mixquant 0.0720 at answer token 1, 0.0129 from token 65 on" in said
        assert "4 of 6 differences are clear of zero: math500, quantized − bf16: −6.4" in said
        assert "math500 84 %, bfcl-v4 67 % and mean 77 %; nothing was lost in aime25" in said
        assert "bf16 210.0 ms, of which 71.4 % linear and 19.0 % attention" in said
        assert "quantized 2.12, 2.32×" in said

    def test_environment_command_and_notes(self) -> None:
        document = Document(everything())
        assert document.text("dd").count("NVIDIA Imaginary") == 5
        assert document.text("dd").count("2.13.0") == 5
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
            update={
                "scores": (),
                "subscores": (),
                "differences": (),
                "recoveries": (),
                "settings": {},
            }
        )
        for empty in (bench, fidelity, evaluation):
            document = Document(page([("x.json", empty)]))
            assert document.all("figure") == document.all("table") == []
            assert document.text("h3") == ["How this was measured"]

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
        assert "More measurements" in document.text("summary")
        assert "5.00 (0.100 to 900.0)" in document.text("td")

    def test_without_a_baseline_values_stand_alone(self) -> None:
        own = [m for m in sample_results.bench().results if m.arm != "bf16"]
        changed = sample_results.bench().model_copy(update={"results": tuple(own)})
        document = Document(page([(None, changed)]))
        assert "×" not in " ".join(document.text("desc"))
        assert "27.8 (26.9 to 29.2)" in document.text("td")

    # Two arms of a page at a time: a page takes long to draw.
    @pytest.mark.parametrize(
        "names",
        [
            ("<script>alert(1)</script>", "$\\frac{a}$ & co"),
            ("control \x00 \x1b[31m \u2028 line\nline", "{{ 7 * 7 }} {% raw %}"),
            *(
                pytest.param(names, marks=pytest.mark.slow)
                for names in (
                    ("</title></svg><img src=x onerror=alert(1)>", "速い"),
                    ("_nolegend_", "quote \" and ' and ]]>"),
                    ("", "#0a05fe"),
                )
            ),
        ],
    )
    @pytest.mark.parametrize("make", SAMPLES)
    def test_names_are_only_text(self, make: Callable[[], Any], names: tuple[str, str]) -> None:
        text = json.dumps(renamed(json.loads(results.to_json(make())), names))
        changed = type(make()).model_validate_json(text)
        document = Document(page([(" ".join(names), changed)]))
        assert document.all("script") == document.all("img") == []
        labels = [" ".join(text.split()) for _, text in document.texts]
        for name in names:
            shown = " ".join(name.split())[:20].rstrip()
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
        assert ("Distance from BF16 against cost" in headings) == (len(points) > 1)


def test_infinite_values_are_no_json() -> None:
    assert "null" in results.to_json(
        sample_results.bench().model_copy(
            update={"results": (measurement("bf16", "ttft", math.inf),)}
        )
    )
