"""Fidelity on both engines, and a real model by hand. Its parts: tests/unit/evaluate/fidelity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import this_machine
import torch
import transformers
from refusals import refusal
from vllm_engines import ON_GPU, require_vllm

import mixquant
from mixquant import cli
from mixquant.evaluate.fidelity import run as fidelity
from mixquant.evaluate.fidelity.answers import Answers
from mixquant.evaluate.fidelity.passages import Passages
from mixquant.results import Divergence, Fidelity, read

LENGTH, ANSWER = 300, 32
# vLLM does not attend in INT8 on a CPU, as Transformers does by default.
INT8 = {"format": "int8", "min_prefill_tokens": 0, "prefill_attention": "bf16"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    files = []
    for name in ("compound", "formatstrings"):
        files.append(folder / f"{name}.txt")
        files[-1].write_text(topics[name])
    return files


def _arguments(texts: list[Path], file: Path) -> list[str]:
    options = [option for text in texts for option in ("--text", str(text))]
    options += ["--length", str(LENGTH), "--answer-tokens", str(ANSWER), "--json", str(file)]
    return options


def _by_arm(result: Any) -> dict[str, Divergence]:
    assert isinstance(result, Fidelity)
    return {one.arm: one for one in result.results}


@pytest.fixture(scope="module")
def measured(model: str, texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Fidelity:
    folder = tmp_path_factory.mktemp("fidelity")
    recipe, file = folder / "my.json", folder / "fidelity.json"
    recipe.write_text(json.dumps(INT8))
    arguments = [model, *_arguments(texts, file), "--recipe", str(recipe)]
    assert cli.main(["fidelity", *arguments, "--recipe", "exact"]) == 0
    result = read(file)
    assert isinstance(result, Fidelity)
    return result


@pytest.mark.slow
class TestOnTransformers:
    def test_arms(self, measured: Fidelity, texts: list[Path]) -> None:
        assert [arm.name for arm in measured.arms] == ["bf16", "my", "exact", "quantized"]
        assert [one.arm for one in measured.results] == ["bf16", "my", "exact", "quantized"]
        assert measured.texts == tuple(map(str, texts))
        bf16, my, exact, quantized = measured.arms
        assert bf16.recipe is None
        assert my.recipe and my.recipe["format"] == {"default": "int8"}
        assert exact.recipe and exact.recipe["format"] == {"default": "bf16"}
        assert quantized.recipe == {**my.recipe, "everywhere": True}
        assert [one.bits for one in measured.costs] == [16, 8, 16, 8]

    def test_exact_is_bf16(self, measured: Fidelity) -> None:
        results = _by_arm(measured)
        exact, bf16 = results["exact"], results["bf16"]
        assert exact == bf16.model_copy(update={"arm": "exact"})
        assert exact.kl_max == 0
        assert exact.top1 == 1
        assert exact.identical_tokens == exact.greedy_tokens == ANSWER
        assert exact.quantized_share == 0

    def test_quantized_is_worse(self, measured: Fidelity) -> None:
        results = _by_arm(measured)
        my, quantized = results["my"], results["quantized"]
        assert 0 < my.kl_mean < quantized.kl_mean
        assert my.quantized_share == (LENGTH - 1) / LENGTH
        assert quantized.quantized_share == 1

    def test_by_hand(self, measured: Fidelity, texts: list[Path], model: str) -> None:
        """The same from Transformers' own calls: a prompt, then one token at a time."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        rows = [tokenizer(text.read_text())["input_ids"][: LENGTH + ANSWER] for text in texts]
        tokens = torch.tensor(rows)

        def load() -> Any:
            return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)

        def expected(model: Any, *, said: bool) -> torch.Tensor:
            cache = transformers.DynamicCache()
            with torch.no_grad():
                if said:
                    with mixquant.phase("prefill"):
                        first = model(tokens[:, :LENGTH], past_key_values=cache).logits[:, -1]
                else:
                    first = model(tokens[:, :LENGTH], past_key_values=cache).logits[:, -1]
                steps = [
                    model(tokens[:, place : place + 1], past_key_values=cache).logits[:, 0]
                    for place in range(LENGTH, LENGTH + ANSWER - 1)
                ]
            return torch.stack([first, *steps], dim=1).double().log_softmax(-1)

        plain = load()
        p = expected(plain, said=False)
        ours = mixquant.prepare(load(), INT8)
        q = expected(ours, said=True)
        kl = (p.exp() * (p - q)).sum(-1)
        nll = -q.gather(-1, tokens[:, LENGTH:, None])

        figures = _by_arm(measured)["my"]
        # Of BF16 products the order of sums may differ between the two; by far not so much.
        assert figures.kl_mean == pytest.approx(kl.mean().item(), rel=0.02)
        assert figures.perplexity == pytest.approx(math.exp(nll.mean().item()), rel=0.005)
        assert figures.by_position[0].kl_mean == pytest.approx(kl[:, 0].mean().item(), rel=0.1)

        def answers(model: Any) -> torch.Tensor:
            written = model.generate(
                tokens[:, :LENGTH],
                attention_mask=torch.ones(2, LENGTH, dtype=torch.int64),
                do_sample=False,
                max_new_tokens=ANSWER,
                min_new_tokens=ANSWER,
            )
            return torch.as_tensor(written[:, LENGTH:])

        same = (answers(plain) == answers(ours)).long().cumprod(dim=1).sum(dim=1)
        assert figures.identical_tokens == same.double().mean().item()


@pytest.mark.slow
def test_long_prompts_are_read_one_by_one(model: str, monkeypatch: Any) -> None:
    """Side by side or not, the answers are put together in order."""
    from mixquant.checkpoints.models import find
    from mixquant.evaluate.fidelity import answers_transformers

    tokens = transformers.AutoTokenizer.from_pretrained(model)(topics["types"])["input_ids"]
    prompts = tuple(tuple(tokens[first : first + 40]) for first in (0, 100, 200))
    passages = [Passages(40, prompts, tuple(prompt[:2] for prompt in prompts))]
    recipe = mixquant.Recipe(format="int8", min_prefill_tokens=0)
    together = answers_transformers.run(find(model), recipe, passages)
    monkeypatch.setattr(answers_transformers, "ROWS_AT_ONCE", 80)
    apart = answers_transformers.run(find(model), recipe, passages)
    (one,), (other,) = together.answers, apart.answers
    assert other.quantized_share == one.quantized_share == 39 / 40
    for number in range(3):
        figures = fidelity.figures(
            "apart",
            Passages(40, prompts[number : number + 1], passages[0].continuations[number:][:1]),
            Answers(one.logits[number : number + 1], one.greedy[number : number + 1], 0),
            Answers(other.logits[number : number + 1], other.greedy[number : number + 1], 0),
        )
        assert figures.kl_max < 0.02


@pytest.mark.slow
@this_machine.needs_patience
class TestOnVLLM:
    def test_agrees_with_transformers(
        self,
        measured: Fidelity,
        model: str,
        texts: list[Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        require_vllm()
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # not nearly all of the memory
        recipe, file = tmp_path / "my.json", tmp_path / "fidelity.json"
        recipe.write_text(json.dumps({**INT8, **this_machine.RECIPE}))
        # Prompts come in three pieces, of which only the last one ends in an answer's token.
        arguments = [model, *_arguments(texts, file), "--recipe", str(recipe)]
        arguments += ["--no-quantized", "--engine", "vllm"]
        arguments += ["--vllm-args", "--max-num-batched-tokens 128 --max-num-seqs 4"]
        arguments += [
            "--arm",
            f"again=--model {model} --seed 1",
        ]  # greedy: the seed decides nothing
        assert cli.main(["fidelity", *arguments]) == 0
        result = read(file)
        assert isinstance(result, Fidelity)
        assert result.engine == "vllm"
        assert [arm.name for arm in result.arms] == ["bf16", "my", "again"]
        assert result.arms[2].arguments == (
            f"--max-num-batched-tokens 128 --max-num-seqs 4 --model {model} --seed 1"
        )
        ours, theirs = _by_arm(result), _by_arm(measured)
        # Both are BF16, with sums in another order: so far, and no further, do they differ.
        for name in ("bf16", "my"):
            # In nats: of six layers a perplexity is in the millions.
            loss, expected = (math.log(one[name].perplexity) for one in (ours, theirs))
            assert loss == pytest.approx(expected, abs=0.05)
        assert ours["bf16"].kl_max == 0
        assert ours["again"] == ours["bf16"].model_copy(update={"arm": "again"})
        my = ours["my"]
        assert theirs["my"].kl_mean / 2.5 < my.kl_mean < theirs["my"].kl_mean * 2.5
        assert my.top1 == pytest.approx(theirs["my"].top1, abs=0.1)
        if not ON_GPU:  # pieces of 128 rows are replayed from graphs there
            assert my.quantized_share == (LENGTH - 1) / LENGTH
        assert [cost.arm for cost in result.costs] == ["bf16", "my"]
        assert result.costs[1] == measured.costs[1]

    def test_an_engine_that_does_not_start(
        self, capsys: pytest.CaptureFixture[str], model: str, texts: list[Path], tmp_path: Path
    ) -> None:
        require_vllm()
        options = _arguments(texts, tmp_path / "fidelity.json")
        options += ["--engine", "vllm", "--vllm-args", "--no-such-thing"]
        line = refusal(capsys, "fidelity", model, *options)
        assert "vLLM ended: " in line
        assert "unrecognized arguments: --no-such-thing" in line
        log = Path(line.split("(full log: ")[1].rstrip(")\n"))
        assert log.is_file()
        assert not (tmp_path / "fidelity.json").exists()
