"""What a worker of vLLM is told, by a script in its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mixquant.checkpoints.models import Checkpoint
from mixquant.core.recipe import Recipe
from mixquant.evaluate.fidelity import answers_vllm
from mixquant.evaluate.fidelity.answers import ArmAnswers
from mixquant.evaluate.fidelity.passages import Passages

WORKER = """
import json, shutil, sys, torch
from pathlib import Path
from safetensors.torch import save_file
folder, kept = Path(sys.argv[2]), Path(sys.argv[1])
shutil.copy(folder / "spec.json", kept)
(folder / "about.json").write_text(json.dumps({"recipe": None, "layers": []}))
save_file({"logits": torch.ones(2, 3)}, folder / "0.safetensors")
(folder / "0.json").write_text(json.dumps({"greedy": [1, 2], "quantized_share": 0.5}))
"""


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], recipe: Any = None
) -> tuple[dict[str, Any], ArmAnswers]:
    """The specification that the worker gets, and what comes of its answers."""
    spec = tmp_path / "spec.json"
    monkeypatch.setattr(answers_vllm, "WORKER_COMMAND", (sys.executable, "-c", WORKER, str(spec)))
    passages = [Passages(5, ((1,) * 5,), ((3, 1),))]
    checkpoint = Checkpoint("some/model", "/some/model", {})
    made = answers_vllm.VLLM(arguments)(checkpoint, recipe, passages)
    return json.loads(spec.read_text()), made


def test_a_recipe_is_given_to_mixquant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(format="fp8")
    spec, made = run(tmp_path, monkeypatch, ("--seed", "1"), recipe)
    expected = ["--model", "/some/model", "--dtype", "bfloat16", "--seed", "1"]
    assert spec["arguments"] == expected
    assert spec["options"]["quantization"] == "mixquant"
    assert spec["options"]["additional_config"] == {"mixquant": recipe.to_dict()}
    assert spec["options"]["max_model_len"] == 7
    assert (spec["prompts"], spec["answers"]) == ([[1] * 5], [[3, 1]])
    (answers,) = made.answers
    assert answers.greedy == ((1, 2),)
    assert answers.quantized_share == 0.5
    assert answers.logits[0].shape == (2, 3)


def test_an_arm_may_name_another_checkpoint_type_and_quantization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = str(tmp_path)
    own = ("--model", other, "--dtype=float16", "--quantization", "fp8")
    spec, _ = run(tmp_path, monkeypatch, own)
    assert spec["arguments"] == list(own)
    assert not {"model", "dtype", "quantization", "additional_config"} & set(spec["options"])
    pytest.importorskip("vllm")
    from mixquant.evaluate.fidelity.vllm_worker import _given

    given = {**_given(spec["arguments"]), **spec["options"]}
    assert (given["model"], given["dtype"], given["quantization"]) == (other, "float16", "fp8")
    assert given["max_model_len"] == 7
