"""Fidelity: its figures against direct computation, a real model by hand, and both engines."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import this_machine
import tiny_models
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from vllm_engines import ON_GPU, require_vllm

import mixquant
from mixquant import cli
from mixquant.core.summary import Layer
from mixquant.evaluate.fidelity import run as fidelity
from mixquant.evaluate.fidelity.answers import Answers
from mixquant.evaluate.fidelity.cost import cost
from mixquant.evaluate.fidelity.passages import PassageError, Passages, cut, documentation
from mixquant.results import Divergence, Fidelity, read

LENGTH, ANSWER = 300, 32


class TestFigures:
    @pytest.fixture
    def example(self) -> tuple[Passages, Answers, Answers]:
        """Two texts, three places each, a vocabulary of eleven."""
        generator = torch.Generator().manual_seed(0)

        def logits() -> tuple[torch.Tensor, ...]:
            return tuple(torch.randn(2, 3, 11, generator=generator) * 3)

        passages = Passages(5, ((1,) * 5, (2,) * 5), ((3, 1, 4), (1, 5, 9)))
        return (
            passages,
            Answers(logits(), ((7, 7, 7), (1, 2, 3)), 0.0),
            Answers(logits(), ((7, 7, 1), (0, 2, 3)), 0.8),
        )

    def test_against_torch(self, example: tuple[Passages, Answers, Answers]) -> None:
        passages, reference, own = example
        figures = fidelity.figures("arm", passages, reference, own)
        p, q = torch.cat(reference.logits), torch.cat(own.logits)
        kl = torch.nn.functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        assert figures.kl_mean == pytest.approx(kl.mean().item(), rel=1e-5)
        assert figures.kl_max == pytest.approx(kl.max().item(), rel=1e-5)
        assert figures.kl_p99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-5)
        assert figures.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
        wanted = torch.tensor(passages.continuations).flatten()
        nll = torch.nn.functional.cross_entropy(q, wanted)
        assert figures.perplexity == pytest.approx(math.exp(nll.item()), rel=1e-5)
        assert (figures.answers, figures.answer_tokens, figures.prompt_tokens) == (2, 6, 5)

    def test_greedy_answers_count_up_to_the_first_other_token(
        self, example: tuple[Passages, Answers, Answers]
    ) -> None:
        figures = fidelity.figures("arm", *example)
        assert figures.identical_tokens == (2 + 0) / 2  # what is the same later does not count
        assert figures.greedy_tokens == 3
        assert figures.quantized_share == 0.8

    def test_the_reference_itself(self, example: tuple[Passages, Answers, Answers]) -> None:
        passages, reference, _ = example
        figures = fidelity.figures("bf16", passages, reference, reference)
        assert figures.kl_mean == figures.kl_p99 == figures.kl_max == 0
        assert (figures.top1, figures.identical_tokens) == (1, 3)


@given(texts=st.integers(1, 3), places=st.integers(1, 300), seed=st.integers(0, 9))
def test_groups_of_places(texts: int, places: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    kl = generator.random((texts, places))
    agrees = generator.random((texts, places)) < 0.5
    groups = fidelity.by_position(kl, agrees)
    firsts = [group.first for group in groups]
    assert firsts == [2**power for power in range(len(firsts))]
    assert firsts[-1] <= places < 2 * firsts[-1]
    ends = [*(first - 1 for first in firsts[1:]), places]
    sizes = [end - first + 1 for first, end in zip(firsts, ends, strict=True)]
    assert sum(sizes) == places  # every place is in one group, so the groups' means make the mean
    mean = sum(size * group.kl_mean for size, group in zip(sizes, groups, strict=True)) / places
    assert mean == pytest.approx(kl.mean())
    share = sum(size * group.top1 for size, group in zip(sizes, groups, strict=True)) / places
    assert share == pytest.approx(agrees.mean())
    for size, group in zip(sizes, groups, strict=True):
        inside = [
            kl[text, group.first - 1 + place] for text in range(texts) for place in range(size)
        ]
        assert group.kl_mean == pytest.approx(sum(inside) / len(inside))


def _layer(name: str, shape: tuple[int, ...], fmt: str) -> Layer:
    return Layer(name, shape, fmt, "kernel", True, 0, None)


class TestCost:
    def test_by_hand(self) -> None:
        layers = [
            _layer("model.layers.0.self_attn.q_proj", (30, 10), "nvfp4"),
            _layer("model.layers.0.self_attn.k_proj", (10, 10), "fp8"),
            _layer("model.layers.0.mlp.down_proj", (10, 60), "bf16"),
            _layer("lm_head", (5000, 10), "bf16"),  # one row of a prompt goes through it
        ]
        result = cost("arm", layers, {}, "lm_head")
        assert result.share == {"bf16": 0.6, "fp8": 0.1, "nvfp4": 0.3}
        assert result.bits == pytest.approx(0.6 * 16 + 0.1 * 8 + 0.3 * 4.5)

    def test_a_token_meets_some_of_the_experts(self) -> None:
        def layers(*experts: Layer) -> list[Layer]:
            return [_layer("model.layers.0.mlp.shared_expert.up_proj", (10, 10), "bf16"), *experts]

        config = {"text_config": {"num_experts_per_tok": 2}}
        name = "model.layers.0.mlp.experts"
        stacked = layers(_layer(f"{name}.up_proj", (8, 10, 10), "int8"))
        apart = layers(*(_layer(f"{name}.{i}.up_proj", (10, 10), "int8") for i in range(8)))
        for these in (stacked, apart):
            assert cost("arm", these, config, None).share == pytest.approx(
                {"bf16": 1 / 3, "int8": 2 / 3}
            )

    def test_of_a_prepared_model(self) -> None:
        model = tiny_models.build("llama")
        formats = {"default": "int8", "k_proj": "fp8", "down_proj": "bf16"}
        mixquant.prepare(model, {"format": formats})
        made = mixquant.summary(model)
        result = cost("arm", made.layers, model.config.to_dict(), "lm_head")
        # Hidden 64, four heads and two for keys of 16, intermediate 96; both layers are alike.
        work = {"bf16": 64 * 96, "fp8": 32 * 64, "int8": 64 * 64 * 2 + 32 * 64 + 2 * 96 * 64}
        assert result.share == pytest.approx({k: v / sum(work.values()) for k, v in work.items()})

    def test_of_a_prepared_mixture(self) -> None:
        model = tiny_models.build("qwen3_moe")
        mixquant.prepare(model, {"format": "int8"})
        made = mixquant.summary(model)
        result = cost("arm", made.layers, model.config.to_dict(), "lm_head")
        # Two of four experts with an intermediate size of 32, and the router, stay BF16 here.
        precise = 2 * 3 * 32 * 64 + 4 * 64
        attention = 64 * 64 * 2 + 2 * 32 * 64
        assert result.share["int8"] == pytest.approx(attention / (attention + precise))


class TestPassages:
    def test_built_in_texts_are_distinct_and_long(self) -> None:
        texts = documentation(4)
        assert len(texts) == len({text[:500] for text in texts.values()}) == 4
        assert sum(len(text) for text in texts.values()) >= sum(map(len, topics.values()))
        assert min(map(len, texts.values())) > 80_000
        with pytest.raises(PassageError, match=f"has {len(topics)} texts, not 1000"):
            documentation(1000)

    def test_what_follows_in_the_text(self, smollm2: tuple[Any, Any]) -> None:
        texts = documentation(2)
        short, long = cut(texts, smollm2[1], [50, 100], 20)
        for number, text in enumerate(texts.values()):
            tokens = smollm2[1](text)["input_ids"]
            assert list(short.prompts[number] + short.continuations[number]) == tokens[:70]
            assert list(long.prompts[number] + long.continuations[number]) == tokens[:120]
            assert len(long.prompts[number]) == long.prompt_tokens == 100


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        assert cli.main(["fidelity", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        *progress, line = printed.err.splitlines(keepends=True)
        assert all(re.fullmatch(r"\w+: .*\(\d+%\), \d+ s so far\n", told) for told in progress)
        assert line.startswith("error: ") and line.endswith("\n")
        return line

    return run


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--recipe", "quick"], "unknown recipe 'quick'"),
            (["--format", "fp3"], "unknown format 'fp3'"),
            (["--length", "0"], "'--length'"),
            (["--text", "nowhere.txt"], "cannot read nowhere.txt: No such file"),
            (["--json", "nowhere/x.json"], "cannot write nowhere/x.json"),
            (["--length", "9000"], "9000 tokens and a continuation of 96 exceed the context"),
            (["--vllm-args", "--seed 1"], "--vllm-args goes with --engine vllm"),
            (["--engine=vllm", "--vllm-args=--dtype=half"], "'--dtype=half' is --dtype, which is"),
            (["--engine=vllm", "--vllm-args=-qfp8"], "'-qfp8' is -q, which this command sets"),
            (["--engine=vllm", "--vllm-args=--max-model-l 9"], "is --max-model-len, which is"),
            (["--texts", "500"], "texts, not 500"),
            (["--recipe", '{"format": {"k_proj": "fp8"}}'], "a mapping needs 'default'"),
        ],
    )
    def test_before_anything_is_loaded(
        self,
        refused: Callable[..., str],
        smollm2_path: str,
        monkeypatch: pytest.MonkeyPatch,
        arguments: list[str],
        says: str,
    ) -> None:
        monkeypatch.setattr("mixquant.evaluate.fidelity.answers_transformers.load_model", None)
        assert says in refused(smollm2_path, *arguments)

    def test_short_text(
        self, refused: Callable[..., str], smollm2_path: str, tmp_path: Path
    ) -> None:
        file = tmp_path / "short.txt"
        file.write_text("The harvest was poor.")
        line = refused(smollm2_path, "--text", str(file), "--length", "8")
        assert "short.txt is too short: it has 5 tokens; a prompt of 8" in line
        line = refused(smollm2_path, "--text", str(file), "--texts", "2")
        assert "leave it out with --text" in line

    def test_a_format_that_vllm_would_emulate(
        self, refused: Callable[..., str], smollm2_path: str
    ) -> None:
        require_vllm()
        if ON_GPU:
            pytest.skip("a GPU may have it")
        line = refused(smollm2_path, "--engine", "vllm", "--format", "nvfp4")
        assert "does not multiply nvfp4 natively" in line


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
    recipe.write_text(json.dumps({"format": "int8", "min_prefill_tokens": 0}))
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
        ours = mixquant.prepare(load(), {"format": "int8", "min_prefill_tokens": 0})
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


def test_what_a_worker_takes_down_with_the_v2_runner(tmp_path: Path) -> None:
    """vLLM has it on GPUs only. A prompt of 10 in pieces of 8 and 2, then three answer tokens."""
    from types import SimpleNamespace

    from safetensors.torch import load_file

    pytest.importorskip("vllm", reason="the recorder asks vLLM for its rank")
    from mixquant.evaluate.fidelity.vllm_worker import Recorder

    class Runner:
        def __init__(self) -> None:
            self.model = torch.nn.Linear(4, 6)
            self.model.compute_logits = lambda hidden: hidden  # type: ignore[assignment]
            prompts = np.array([0, 10])
            self.req_states = SimpleNamespace(prompt_len=SimpleNamespace(np=prompts))

        def get_model(self) -> Any:
            return self.model

        def prepare_inputs(self, scheduler_output: Any, description: Any) -> Any:
            first, count = scheduler_output
            return SimpleNamespace(
                num_reqs=1,
                req_ids=["a"],
                idx_mapping_np=np.array([1]),
                num_computed_tokens_np=np.array([first]),
                num_scheduled_tokens=np.array([count]),
            )

    runner, worker = Runner(), Recorder()
    worker.model_runner = runner
    passes = [(0, 8), (8, 2), (10, 1), (11, 1)]
    logits = torch.randn(4, 1, 6)
    written = []
    worker.mixquant_record([5, 0, 3])
    for one, its in zip(passes, logits, strict=True):
        assert runner.prepare_inputs(one, None).num_reqs == 1
        written.append(runner.model.compute_logits(its).argmax().item())
    monkey = pytest.MonkeyPatch()
    monkey.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda: 0)
    worker.mixquant_recorded(str(tmp_path / "0.safetensors"))
    monkey.undo()
    assert written == [logits[0].argmax().item(), 5, 0, 3]
    assert torch.equal(load_file(tmp_path / "0.safetensors")["logits"], logits[1:, 0])
    # Afterwards the model answers by itself.
    runner.prepare_inputs((10, 1), None)
    assert torch.equal(runner.model.compute_logits(logits[2]), logits[2])


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
        int8 = {"format": "int8", "min_prefill_tokens": 0, **this_machine.RECIPE}
        recipe.write_text(json.dumps(int8))
        # Prompts come in three pieces, of which only the last one ends in an answer's token.
        arguments = [model, *_arguments(texts, file), "--recipe", str(recipe)]
        arguments += ["--no-quantized", "--engine", "vllm"]
        arguments += ["--vllm-args", "--max-num-batched-tokens 128 --max-num-seqs 4"]
        assert cli.main(["fidelity", *arguments]) == 0
        result = read(file)
        assert isinstance(result, Fidelity)
        assert result.engine == "vllm"
        assert [arm.name for arm in result.arms] == ["bf16", "my"]
        ours, theirs = _by_arm(result), _by_arm(measured)
        # Both are BF16, with sums in another order: so far, and no further, do they differ.
        for name in ("bf16", "my"):
            # In nats: of six layers a perplexity is in the millions.
            loss, expected = (math.log(one[name].perplexity) for one in (ours, theirs))
            assert loss == pytest.approx(expected, abs=0.05)
        assert ours["bf16"].kl_max == 0
        my = ours["my"]
        assert theirs["my"].kl_mean / 2.5 < my.kl_mean < theirs["my"].kl_mean * 2.5
        assert my.top1 == pytest.approx(theirs["my"].top1, abs=0.1)
        if not ON_GPU:  # pieces of 128 rows are replayed from graphs there
            assert my.quantized_share == (LENGTH - 1) / LENGTH
        assert result.costs[1] == measured.costs[1]

    def test_an_engine_that_does_not_start(
        self, refused: Callable[..., str], model: str, texts: list[Path], tmp_path: Path
    ) -> None:
        require_vllm()
        options = _arguments(texts, tmp_path / "fidelity.json")
        line = refused(model, *options, "--engine", "vllm", "--vllm-args", "--no-such-thing")
        assert "vLLM ended: " in line
        assert "unrecognized arguments: --no-such-thing" in line
        log = Path(line.split("(full log: ")[1].rstrip(")\n"))
        assert log.is_file()
        assert not (tmp_path / "fidelity.json").exists()
