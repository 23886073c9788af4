"""Fidelity's figures against direct computation."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mixquant.checkpoints.models import Checkpoint
from mixquant.cli.tables.fidelity import tables
from mixquant.evaluate.fidelity import run as fidelity
from mixquant.evaluate.fidelity.answers import Answers, ArmAnswers, Engine, EngineError
from mixquant.evaluate.fidelity.passages import Passages
from mixquant.report.fidelity import section
from mixquant.results import Fidelity


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


class TestArmsOfTheUsers:
    """Arms that are vLLM's arguments instead of a recipe."""

    CHECKPOINT = Checkpoint("some/model", "some/model", {})
    PASSAGES = (Passages(5, ((1,) * 5,), ((3, 1),)),)

    @staticmethod
    def engine(vocabulary: int, shift: float) -> Engine:
        def run(checkpoint: Any, recipe: Any, passages: Any, progress: Any) -> ArmAnswers:
            logits = torch.arange(2.0 * vocabulary).reshape(2, -1).remainder(7)
            logits[:, 0] += shift
            answers = Answers((logits,), ((0, 0),), 0.0)
            return ArmAnswers((answers,), recipe=None, layers=(), head=None)

        return run

    def measured(self, vocabulary: int) -> Fidelity:
        return fidelity.measure(
            self.engine(11, 0),
            self.CHECKPOINT,
            {},
            self.PASSAGES,
            others={"fp8": (self.engine(vocabulary, 3), "--quantization fp8")},
            description={"command": "", "engine": "vllm", "texts": ("a",)},
        )

    def test_they_are_compared_and_have_no_cost(self) -> None:
        result = self.measured(11)
        bf16, fp8 = result.arms
        assert (fp8.name, fp8.arguments, fp8.recipe) == ("fp8", "--quantization fp8", None)
        assert bf16.arguments is None
        assert [cost.arm for cost in result.costs] == ["bf16"]
        assert [one.kl_mean > 0 for one in result.results] == [False, True]

    def test_they_are_shown_without_a_cost_and_without_a_warning(self) -> None:
        result = self.measured(11)
        console = Console(width=120)
        with console.capture() as shown:
            console.print(*tables(result))
        assert re.search(r"^ *fp8 +- +- +- +0\.\d{4} ", shown.get(), re.MULTILINE)
        assert "quantized no prompt token" not in shown.get()
        assert "-: vLLM's arguments decide" in shown.get()
        assert section(result).notes == ()

    def test_another_vocabulary_is_refused(self) -> None:
        with pytest.raises(EngineError, match="fp8: its vocabulary has 12 tokens, that of bf16 11"):
            self.measured(12)
