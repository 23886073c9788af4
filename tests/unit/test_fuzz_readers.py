"""Readers of what others wrote: whatever they are given, they take it or say in one line why not."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any, ClassVar

import hostile
import pytest
import sample_results
import torch
import yaml
from example_counts import up_to
from hostile import FUZZ, is_one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mixquant import results
from mixquant.bench.trace import TraceError, parse
from mixquant.checkpoints import models
from mixquant.checkpoints.errors import CheckpointError, ModelError
from mixquant.checkpoints.prefill import PrefillCheckpoint
from mixquant.core.recipe import Recipe, RecipeError
from mixquant.evaluate.benchmarks.answer_file import AnswerFile, AnswerFileError, Entry
from mixquant.evaluate.benchmarks.chat import Usage
from mixquant.evaluate.tasks import TaskError, Verdict
from mixquant.evaluate.tasks.bfcl import _Question as Calls
from mixquant.evaluate.tasks.longmemeval import LongMemEvalQuestion
from mixquant.evaluate.tasks.mathematics import _AimeProblem, _GradeSchoolProblem
from mixquant.evaluate.tasks.records import read_records
from mixquant.formats import fp8
from mixquant.report import page
from mixquant.report.page import _section
from mixquant.serve.description import Deployment, ServeError, read
from mixquant.servers.arms import ArmError, served_models

RECIPE: dict[str, Any] = {
    **Recipe(format={"default": "nvfp4", "*.k_proj": "fp8"}, prefill_model="x").to_dict(),
}


class TestRecipe:
    @FUZZ
    @given(hostile.texts(RECIPE))
    def test_text(self, text: str) -> None:
        try:
            recipe = Recipe.from_json(text)
        except RecipeError as error:
            assert is_one_line(str(error))
        else:
            assert Recipe.from_json(recipe.to_json()) == recipe

    @FUZZ
    @given(hostile.values | st.binary() | st.sets(st.integers()))
    def test_values(self, value: Any) -> None:
        for given_ in (value, {"format": value}, {"ignore": value}, {"precise_head": value}):
            try:
                Recipe.from_dict(given_).resolved(frozenset({"fp8"}))
            except RecipeError as error:
                assert is_one_line(str(error))

    @FUZZ
    @given(st.text())
    def test_source(self, source: str) -> None:
        try:
            Recipe.load(source)
        except RecipeError as error:
            assert is_one_line(str(error).encode(errors="replace").decode())


CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "max_position_embeddings": 2048,
    "quantization_config": {"quant_method": "mixquant", "recipe": {"preset": "fast"}},
    "text_config": {"max_position_embeddings": 512, "quantization_config": None},
}


@FUZZ
@given(hostile.texts(CONFIG))
def test_model(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    try:
        checkpoint = models.find(str(tmp_path))
        assert checkpoint.context is None or checkpoint.context > 0
        Recipe.from_dict(checkpoint.recipe or {})
    except (ModelError, RecipeError) as error:
        assert is_one_line(str(error))


WEIGHTS = {
    "num_bits": 8,
    "type": "float",
    "strategy": "channel",
    "symmetric": True,
    "actorder": None,
}
QUANTIZED: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
        "sparsity_config": {"format": "dense"},
        "transform_config": {},
    },
}


class TestPrefillCheckpoint:
    @pytest.fixture(scope="class")
    def directory(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """One FP8 layer; config.json is the test's."""
        directory = tmp_path_factory.mktemp("checkpoint")
        weight, scale = fp8.quantize(torch.randn(16, 64))
        tensors = {
            "model.layers.0.q_proj.weight": weight,
            "model.layers.0.q_proj.weight_scale": scale,
        }
        save_file(tensors, directory / "model.safetensors")
        return directory

    @FUZZ
    @given(hostile.texts(QUANTIZED), hostile.changed(CONFIG))
    def test_config(self, directory: Path, text: str, main: dict[str, Any]) -> None:
        (directory / "config.json").write_text(text)
        try:
            checkpoint = PrefillCheckpoint.open(directory)
            assert checkpoint.formats == {"model.layers.0.q_proj": "fp8"}
            checkpoint.check_against(main)
        except CheckpointError as error:
            assert is_one_line(str(error))

    @FUZZ
    @given(hostile.texts({"weight_map": {"model.layers.0.q_proj.weight": "model.safetensors"}}))
    def test_index(self, directory: Path, tmp_path: Path, text: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps(QUANTIZED))
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError) as caught:
            PrefillCheckpoint.open(tmp_path)
        assert is_one_line(str(caught.value))


SAMPLES = [
    json.loads(results.to_json(make()))
    for make in (
        sample_results.bench,
        sample_results.fidelity,
        sample_results.evaluation,
        sample_results.comparison,
        sample_results.tuning,
    )
]
FIGURES = st.sampled_from([0, 0.0, -1.5, 1e-320, 1e-9, 1e15, 1e30, -1e30, 2**53, 10**15])


class TestResults:
    @FUZZ
    @given(st.sampled_from(SAMPLES).flatmap(hostile.texts))
    def test_text(self, tmp_path: Path, text: str) -> None:
        """Up to the figures and tables of a page; drawing its plots takes too long for so many."""
        file = tmp_path / "results.json"
        file.write_text(text)
        try:
            _section(results.read(file))
        except results.ResultsError as error:
            assert is_one_line(str(error))

    @settings(FUZZ, max_examples=up_to(8))
    @given(st.data())
    def test_page(self, tmp_path: Path, data: st.DataObject) -> None:
        """With every figure of a kind odd: all rates zero, say."""
        sample = copy.deepcopy(data.draw(st.sampled_from(SAMPLES)))
        places = [
            (where, key)
            for where, key in hostile.places(sample)
            if isinstance(where, dict) and type(where[key]) in (int, float)
        ]
        odd = data.draw(st.sampled_from(sorted({key for _, key in places})))
        value = data.draw(FIGURES)
        for where, key in places:
            if key == odd:
                where[key] = value
        file = tmp_path / "results.json"
        file.write_text(json.dumps(sample))
        try:
            assert page([("results.json", results.read(file))])
        except results.ResultsError as error:
            assert is_one_line(str(error))

    @pytest.mark.parametrize("value", [1e31, -1e308, 10**400])
    def test_figures_beyond_measure_are_refused_by_name(self, tmp_path: Path, value: float) -> None:
        sample = copy.deepcopy(SAMPLES[0])
        sample["results"][3]["value"] = value
        file = tmp_path / "results.json"
        file.write_text(json.dumps(sample))
        with pytest.raises(
            results.ResultsError, match=r"field 'results\.3\.value' is beyond 1e\+30"
        ):
            results.read(file)

    def test_rates_of_zero_have_no_ratio(self) -> None:
        """Rather than a division by zero, or infinity."""
        whole = sample_results.comparison()
        arms = tuple(
            arm.model_copy(update={"prefill_tokens_per_s": 0.0, "tpot_s": 0.0})
            for arm in whole.arms
        )
        section = _section(whole.model_copy(update={"arms": arms}))
        assert not any("speed against" in figure.meaning for figure in section.key_figures)
        assert [row[-1] for row in section.panels[0].table.rows] == ["–", "–", "–"]


DEPLOYMENT: dict[str, Any] = {
    "model": "some/model",
    "recipe": {"preset": "fast", "ignore": ["lm_head"]},
    "prefill": 2,
    "decode": 1,
    "prefill_gpus": [0, 1],
    "port": 8000,
    "vllm_arguments": ["--max-model-len", "4096"],
    "environment": {"NAME": "value"},
    "start_timeout": 60,
}


class TestDeployment:
    @FUZZ
    @given(hostile.texts(DEPLOYMENT) | hostile.changed(DEPLOYMENT).map(yaml.safe_dump))
    def test_file(self, tmp_path: Path, text: str) -> None:
        """YAML, which JSON is, too."""
        file = tmp_path / "set.yaml"
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            deployment = Deployment.from_values(read(file), f"{file}: ")
            assert Deployment.from_values(deployment.model_dump(mode="json")) == deployment
        except ServeError as error:
            assert is_one_line(str(error))


MODELS = {"object": "list", "data": [{"id": "m", "max_model_len": 4096}, {"id": "lora"}]}


@FUZZ
@given(hostile.texts(MODELS))
def test_a_server_s_models(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        answer = io.BytesIO(text.encode(errors="surrogatepass"))
        patch.setattr("urllib.request.urlopen", lambda *_, **__: answer)
        try:
            served = served_models("http://127.0.0.1:1")
        except ArmError as error:
            assert is_one_line(str(error))
        else:
            assert all(tokens is None or tokens > 0 for tokens in served.values())


SESSION = {
    "session": "one",
    "messages": [
        {"role": "user", "content": "What is there?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "ls", "arguments": "{}"}}]},
        {"role": "tool", "content": "a b c"},
    ],
}


@FUZZ
@given(hostile.texts(SESSION))
def test_trace(text: str) -> None:
    try:
        for session in parse(text, "trace.jsonl"):
            "".join(message.text() for message in session.messages).encode()
    except TraceError as error:
        assert is_one_line(str(error))


RECORDS: list[tuple[Any, dict[str, Any]]] = [
    (_AimeProblem, {"id": "1", "problem": "2 + 2?", "answer": "4"}),
    (_GradeSchoolProblem, {"question": "2 + 2?", "answer": "So it is.\n#### 4"}),
    (
        LongMemEvalQuestion,
        {
            "question_id": "1",
            "question_type": "multi-session",
            "question": "Where?",
            "answer": "here",
            "question_date": "2026",
            "haystack_dates": ["2025"],
            "haystack_sessions": [[{"role": "user", "content": "I am here."}]],
        },
    ),
    (Calls, {"id": "1", "question": [[{"role": "user", "content": "?"}]], "function": [{}]}),
]


@FUZZ
@given(st.data())
@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_records(tmp_path: Path, ending: str, data: st.DataObject) -> None:
    schema, record = data.draw(st.sampled_from(RECORDS))
    text = data.draw(hostile.texts([record] if ending == "json" else record))
    file = tmp_path / f"data.{ending}"
    file.write_text(text)
    try:
        assert read_records(file, schema)
    except TaskError as error:
        assert is_one_line(str(error))


class TestAnswerFile:
    CONFIGURATION: ClassVar[dict[str, Any]] = {"model": "m", "settings": {"temperature": 0.6}}

    @pytest.fixture(scope="class")
    def lines(self, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
        path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
        file = AnswerFile(path, self.CONFIGURATION)
        file.add(("one", 0), Entry({"text": "4"}, Usage(1, 2, 3, 0.5), None, Verdict(1.0, "right")))
        file.add(("two", 0), Entry({"text": "\ud83d"}, Usage(1, 2, 3, 0.5)))
        file.add(("two", 0), Entry({"text": "\ud83d"}, Usage(1, 2, 3, 0.5), "no verdict"))
        file.close()
        return [json.loads(line) for line in path.read_text().splitlines()]

    @FUZZ
    @given(st.data())
    def test_changed(self, lines: list[Any], tmp_path: Path, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(lines) - 1))
        text = "".join(
            (data.draw(hostile.texts(line)) if place == number else json.dumps(line)) + "\n"
            for place, line in enumerate(lines)
        )
        path = tmp_path / "answers.jsonl"
        path.write_text(text)
        try:
            for entry in AnswerFile(path, self.CONFIGURATION).entries.values():
                assert entry.verdict is None or 0 <= entry.verdict.score <= 1
        except AnswerFileError as error:
            assert is_one_line(str(error))
