"""What the page says in words: title, verdict, contents, meanings, and the names of arms."""

from __future__ import annotations

from typing import Any

import pytest
import sample_results
from page_document import Document
from paths import RESULTS
from sample_results import measurement

from mixquant import results
from mixquant.report import page
from mixquant.report.names import described, device_in_words, labels_of, model_name
from mixquant.report.page import _section
from mixquant.results import Arm, Bench


def bench(*measured: results.Measurement, **changes: Any) -> Bench:
    values = {"results": measured, "breakdown": (), **changes}
    return sample_results.bench().model_copy(update=values)


def lengths(**ratios: float) -> list[results.Measurement]:
    """Time to first token at prompts of ``t2048=`` tokens and so on, BF16's over the arm's."""
    found = []
    for name, ratio in ratios.items():
        tokens = int(name.removeprefix("t"))
        found += [
            measurement("bf16", "ttft", 100.0, tokens=tokens),
            measurement("mixquant", "ttft", 100.0 / ratio, tokens=tokens),
        ]
    return found


class TestVerdict:
    @pytest.mark.parametrize(
        ("ratios", "says"),
        [
            (
                {"t2048": 1.07},
                "is 1.07 times as fast as BF16 at 2,048 prompt tokens on NVIDIA Imaginary.",
            ),
            (
                {"t2048": 1.5, "t8192": 1.1},
                "is 1.10 to 1.50 times as fast as BF16 at 2,048 to 8,192 prompt tokens",
            ),
            (
                {"t2048": 0.8, "t8192": 1.1},
                "is 0.80 to 1.10 times as fast as BF16 at 2,048 to 8,192 prompt tokens on NVIDIA "
                "Imaginary (slower at 2,048 tokens).",
            ),
            (
                {"t2048": 0.8},
                "is slower than BF16 at 2,048 prompt tokens on NVIDIA Imaginary: 0.80 times as fast.",
            ),
            ({"t2048": 0.8, "t8192": 1.0}, "is no faster than BF16 at 2,048 to 8,192"),
            ({"t2048": 1.01}, "is about as fast as BF16 at 2,048 prompt tokens"),
        ],
    )
    def test_faster_and_slower(self, ratios: dict[str, float], says: str) -> None:
        verdict = _section(bench(*lengths(**ratios))).verdict
        assert verdict.startswith("Prefill of model with mixquant ")
        assert says in verdict

    def test_runs_that_overlap_show_no_difference(self) -> None:
        runs = [
            measurement("bf16", "ttft", 100.0, lowest=90.0, highest=130.0),
            measurement("mixquant", "ttft", 80.0, lowest=75.0, highest=110.0),
        ]
        assert "not clearly different from BF16" in _section(bench(*runs)).verdict

    def test_requests_that_differ_are_no_repeats(self) -> None:
        # Lowest and highest of a trace are of its shortest and longest prompt.
        runs = [
            measurement(arm, "ttft", ms, workload="agent", lowest=ms / 9, highest=9 * ms)
            for arm, ms in (("bf16", 100.0), ("mixquant", 50.0))
        ]
        assert "is 2.00 times as fast as BF16 in the agent trace" in _section(bench(*runs)).verdict

    def test_committed_results(self) -> None:
        said = {
            name: _section(results.read(RESULTS / f"{name}.json")).verdict
            for name in ("h200", "compare_cpu_amx", "compare_nvfp4", "disaggregated_h200")
        }
        assert said["h200"].startswith(
            "Prefill of qwen3-8b with mixquant is 1.10 to 1.39 times as fast as BF16 at 2,048 to "
            "131,072 prompt tokens on NVIDIA H200. Decode is about as fast as BF16 at batch sizes "
        )
        assert "fp8: prefill 1.11 to 1.56 times and decode 1.19 to 1.41 times" in said["h200"]
        assert said["compare_cpu_amx"].startswith(
            "Prefill of smollm2 with mixquant is 1.36 times as fast as BF16 at 3,187 prompt tokens in 3 "
            "turns on a CPU (AVX512, 2 threads). Decode is about as fast as BF16"
        )
        assert said["compare_nvfp4"].startswith("NVFP4 is emulated on a CPU")
        assert "times as fast" not in said["compare_nvfp4"]
        assert "no arm bf16 to compare with" in said["disaggregated_h200"]

    def test_a_comparison_in_which_mixquant_is_slower(self) -> None:
        file = results.read(RESULTS / "compare_cpu_amx.json")
        assert isinstance(file, results.Comparison)
        bf16, quantized, mixquant = file.arms
        times = {
            "prefill_tokens_per_s": 0.9 * bf16.prefill_tokens_per_s,
            "ttft_s": bf16.ttft_s / 0.9,
        }
        slower = mixquant.model_copy(update=times)
        said = _section(file.model_copy(update={"arms": (bf16, quantized, slower)})).verdict
        assert said.startswith(
            "Prefill of smollm2 with mixquant is slower than BF16 at 3,187 prompt tokens in 3 turns "
            "on a CPU (AVX512, 2 threads): 0.90 times as fast. Decode is about as fast as BF16"
        )

    def test_scores_and_distances(self) -> None:
        scores = _section(sample_results.evaluation()).verdict
        assert "mixquant 61.6 %" in scores
        assert "worse than BF16 beyond chance in bfcl-v4" in scores
        assert "better than BF16 beyond chance in aime25" in scores
        distances = _section(sample_results.fidelity()).verdict
        assert "with mixquant are 0.0360 nats per token from BF16's" in distances
        assert "the furthest is fast (0.132)" in distances

    def test_tuning(self) -> None:
        section = _section(sample_results.tuning())
        assert section.verdict.startswith(
            "For at least 95.0 % of the loss recovered, the cheapest recipe found for model on "
            "blackwell takes 1.10 times the prefill time of the fastest format everywhere"
        )
        assert (
            "the recipe is 0.0171 nats per token from BF16 and wins back 95.3 %" in section.verdict
        )
        assert (
            "1.06 to 1.12 times the predicted ones; their rank correlation is 1.00"
            in (section.notes[0])
        )
        assert [figure.value for figure in section.key_figures] == ["95.3 %", "1.10"]
        assert "where a recipe was not measured on those, on the texts" in section.panels[0].meaning


class TestNothingQuantized:
    """A ratio would be noise, so none is shown, and the page says why."""

    def test_speed(self) -> None:
        measured = [
            *lengths(t64=1.25, t4096=1.5),
            measurement("mixquant", "quantized", 0.0, unit="share", tokens=64),
            measurement("mixquant", "quantized", 1.0, unit="share", tokens=4096),
        ]
        arm = Arm(name="mixquant", recipe={"min_prefill_tokens": 128})
        text = page([(None, bench(*measured, arms=(Arm(name="bf16"), arm)))])
        assert "1.50×" in text
        assert "1.25×" not in text
        assert "1.25 " not in text
        assert (
            "mixquant quantized no prompt token for prompts of 64 tokens: fewer tokens than its "
            "threshold, 128. The page counts no speed-up there." in Document(text).text("p")
        )

    def test_speed_of_all_measurements(self) -> None:
        measured = [
            *lengths(t64=1.25),
            measurement("mixquant", "quantized", 0.0, unit="share", tokens=64),
        ]
        text = page([(None, bench(*measured))])
        assert "times as fast" not in text
        assert "×" not in text

    def test_comparison(self) -> None:
        sample = sample_results.comparison()
        arms = tuple(arm.model_copy(update={"quantized_prefill_tokens": 0}) for arm in sample.arms)
        recipe = sample.recipe | {"min_prefill_tokens": 128}
        text = page([(None, sample.model_copy(update={"arms": arms, "recipe": recipe}))])
        assert "times as fast" not in text
        assert "×" not in text
        assert "mixquant quantized no prompt token, so its times are no speed-up" in text
        assert "from 128 tokens on" in text
        assert "×" in page([(None, sample)])

    def test_fidelity(self) -> None:
        sample = sample_results.fidelity()
        changed = tuple(d.model_copy(update={"quantized_share": 0.0}) for d in sample.results)
        notes = _section(sample.model_copy(update={"results": changed})).notes
        assert len(notes) == 5
        assert notes[0].startswith(
            "quantized quantized no prompt token at prompts of 512 and 2,048"
        )
        assert _section(sample).notes == ()


class TestTables:
    def test_an_evaluation_has_extraction_rates_lengths_and_sub_scores(self) -> None:
        tables = {table.caption: table for table in _section(sample_results.evaluation()).tables}
        answers = tables["Answers with something to score, and mean lengths"]
        assert ("math500", "bf16", "100.0 %", "1,234", "5,679") in answers.rows
        parts = tables["Sub-scores (95 % interval)"]
        assert parts.columns == ("Group", "bf16", "quantized", "mixquant")
        assert [row[0] for row in parts.rows] == ["math500/level 1", "math500/level 2"]
        assert parts.rows[0][1] == "90.0 % (85.0 % to 92.5 %)"

    def test_fidelity_by_length_has_both_figures(self) -> None:
        panels = {panel.title: panel for panel in _section(sample_results.fidelity()).panels}
        table = panels["Distance from BF16 by prompt length"].table
        assert table.rows[0][:3] == ("512", "0.0900 (91.0 %)", "0.0300 (97.0 %)")


class TestHeader:
    def test_title_names_the_model(self) -> None:
        document = Document(page([(None, sample_results.bench())]))
        assert document.text("h1") == ["mixquant on model"]
        assert document.text("title")[0] == "mixquant on model"

    def test_contents_lead_to_every_plot(self) -> None:
        document = Document(
            page([("a.json", sample_results.bench()), ("b.json", sample_results.comparison())])
        )
        targets = {(a["href"] or "").removeprefix("#") for a in document.all("a")}
        figures = {figure["id"] for figure in document.all("figure")}
        assert len(figures) == 11
        assert figures <= targets
        assert {"file-1", "file-2", "file-1-conditions", "file-2-conditions"} <= targets


class TestNames:
    def test_model_and_device(self) -> None:
        assert model_name("benchmarks/models/qwen3-8b") == "qwen3-8b"
        assert model_name("HuggingFaceTB/SmolLM2-135M/") == "SmolLM2-135M"
        assert model_name("/") == "/"
        environment = sample_results.ENVIRONMENT.model_copy(update={"device": "CPU, AVX512"})
        assert device_in_words(environment) == "a CPU (AVX512, 16 threads)"
        assert device_in_words(sample_results.ENVIRONMENT) == "NVIDIA Imaginary"

    def test_committed_recipes_are_named_by_what_differs(self) -> None:
        found = results.read(RESULTS / "fidelity_fp8_attention_h100.json")
        assert isinstance(found, results.Fidelity)
        assert labels_of(found.arms) == {
            "recipe": "exact + attention fp8",
            "recipe-2": "fast + attention fp8",
            "recipe-3": "fast + attention bf16",
        }
        text = page([(None, found)])
        assert "fast + attention fp8 (recipe-2 in the file)" in Document(text).text("h4")
        assert text.count("recipe-2") == 1

    @pytest.mark.parametrize(
        ("recipes", "labels"),
        [
            ([{"preset": "fast"}], {"recipe": "fast"}),
            ([{"preset": "fast"}, {"preset": "exact"}], {"recipe": "fast", "recipe-2": "exact"}),
            (
                [{"format": {"default": "fp8"}}, {"format": {"default": "nvfp4"}}],
                {"recipe": "fp8", "recipe-2": "nvfp4"},
            ),
            (
                [{"preset": "fast", "precise_tail": n} for n in (1, 64)],
                {"recipe": "tail 1", "recipe-2": "tail 64"},
            ),
            (
                [{"preset": "fast", "emulate": on} for on in (True, False)],
                {"recipe": "emulate", "recipe-2": "no emulate"},
            ),
            ([{"preset": "fast"}, {"preset": "fast"}], {}),
            ([{"preset": "mine"}], {}),
        ],
    )
    def test_labels(self, recipes: list[dict[str, Any]], labels: dict[str, str]) -> None:
        arms = [
            Arm(name="recipe" if n == 1 else f"recipe-{n}", recipe=recipe)
            for n, recipe in enumerate(recipes, 1)
        ]
        assert labels_of([Arm(name="bf16"), Arm(name="mine", recipe={"a": 1}), *arms]) == labels

    @pytest.mark.parametrize(
        ("recipe", "said"),
        [
            ({"format": {"default": "fp8"}}, "prefill in FP8, decode in BF16"),
            (
                {"format": {"default": "fp8"}, "prefill_attention": "auto"},
                "prefill in FP8, decode in BF16",
            ),
            (
                {"format": {"default": "fp8"}, "prefill_attention": "fp8"},
                "prefill in FP8, decode in BF16; prefill attends in FP8",
            ),
            (
                {"format": {"default": "bf16"}, "prefill_attention": "fp8"},
                "no linear layer quantized; prefill attends in FP8",
            ),
            (
                {"format": {"default": "nvfp4", "k_proj": "fp8", "v_proj": "bf16"}},
                "prefill in NVFP4 (k_proj in FP8 and v_proj in BF16), decode in BF16",
            ),
            (
                {"format": {"default": "nvfp4", "a": "fp8", "b": "bf16", "c": "fp8", "d": "fp8"}},
                "prefill in NVFP4 (3 patterns in FP8 and 1 in BF16: see the recipe below), "
                "decode in BF16",
            ),
            (
                {"format": {"default": "nvfp4", **dict.fromkeys("abcdefghi", "bf16")}},
                "prefill in NVFP4 (9 patterns in BF16: see the recipe below), decode in BF16",
            ),
            (
                {"format": {"default": "fp8"}, "everywhere": True, "prefill_attention": "auto"},
                "prefill and decode in FP8",
            ),
            (
                {"format": {"default": "nvfp4"}, "prefill_model": "a/b", "precise_tail": 64},
                "prefill in NVFP4, decode in BF16; the copy's weights are of b; the last 64 tokens are "
                "precise",
            ),
        ],
    )
    def test_descriptions_are_short(self, recipe: dict[str, Any], said: str) -> None:
        ((_, words),) = described(bench(arms=(Arm(name="mine", recipe=recipe),)))
        assert words == said

    @pytest.mark.parametrize(("other", "named"), [("bf16", False), ("fp8", True)])
    def test_attention_is_named_where_it_differs(self, other: str, named: bool) -> None:
        recipes = [
            {"format": {"default": "fp8"}, "prefill_attention": one} for one in ("bf16", other)
        ]
        arms = tuple(Arm(name=f"mine-{n}", recipe=recipe) for n, recipe in enumerate(recipes))
        words = [words for _, words in described(bench(arms=arms))]
        assert [("attends" in one) for one in words] == [named, named]

    def test_the_arm_attention_quantizes_nothing(self) -> None:
        found = results.read(RESULTS / "compare_cpu_epyc.json")
        assert dict(described(found)) == {
            "bf16": "the model as it is, nothing quantized",
            "attention": "nothing quantized; the prompt attends in mixquant's kernel, in BF16",
            "quantized": "prefill and decode in INT8",
            "mixquant": "prefill in INT8, decode in BF16",
        }

    def test_own_names_stay(self) -> None:
        assert labels_of([Arm(name="fast", recipe={"preset": "fast"}), Arm(name="recipe")]) == {}


def test_meanings_do_not_repeat_the_numbers() -> None:
    for panel in _section(results.read(RESULTS / "h200.json")).panels:
        assert "×" in panel.numbers
        assert "×" not in panel.meaning
        assert "BF16" in panel.meaning


def test_a_meaning_says_which_arm_is_ahead() -> None:
    ttft, tpot, sixteen = _section(results.read(RESULTS / "h200.json")).panels
    assert "mixquant is faster than BF16 throughout, most at 8,192 tokens" in ttft.meaning
    assert "fp8 is ahead of mixquant at 2,048, 8,192 and 32,768 tokens" in ttft.meaning
    assert "mixquant decodes in BF16, so no gain is expected here" in tpot.meaning
    assert "mixquant and fp8 are faster than BF16" in sixteen.meaning
