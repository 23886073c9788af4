"""The run: sensitivities, the search, candidates measured, and the texts held out that decide."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mixquant._version import __version__
from mixquant.checkpoints.models import Checkpoint
from mixquant.checkpoints.second_checkpoint import check_fits, opened
from mixquant.core.recipe import Recipe
from mixquant.engines.transformers.layout import EXPERTS
from mixquant.evaluate.fidelity.cost import BITS
from mixquant.evaluate.fidelity.passages import Passages
from mixquant.results import Arm, Environment, Predicted, Tried, Tuning
from mixquant.tune import measure
from mixquant.tune.budget import Budget
from mixquant.tune.choice import BlockScale, Choice
from mixquant.tune.cost import CostModel
from mixquant.tune.decide import MEASURED, cheapest_within, rank, ratios_of, recovered
from mixquant.tune.search import FrontierPoint, Predictor, by_bits, by_time
from mixquant.tune.sensitivity import draw, edges, variants_of
from mixquant.tune.targets import Target
from mixquant.tune.units import Units, units_of
from mixquant.tune.work import Work, WorkError

HEADS = (0, 1, 4, 16, 64)
TAILS = (1, 16, 32, 64, 128, 256)
DRAWS = 64  # more texts help more than more draws
ROWS_WITH_GRADIENTS = 4096  # in one pass
QUANTIZED = "quantized"  # the arm that quantizes both phases

Progress = Callable[[str, float], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Texts:
    """Passages of one prompt length with the names of their texts."""

    names: tuple[str, ...]
    passages: Passages


@dataclass(frozen=True)
class Tuned:
    """The outcome: the recipe, and everything that led to it."""

    recipe: Recipe
    results: Tuning


class Tuner:
    """One run.

    Attributes:
        checkpoint: of the model.
        target: what the recipe is for.
        budget: what it has to stay within.
        searched: the texts that the search sees.
        held_out: the texts that decide; their prompts may have another length.
        cost_tokens: of the prompt whose prefill the cost model times.
        folder: where the work is kept.
        prefill_model: the checkpoint of layers in the target's fastest format, or None.

    Raises:
        CheckpointError: the prefill_model cannot be read, or is of another model.
        FolderError: the folder cannot be made.
        WorkError: the folder cannot be used, the texts are not other ones, or the prefill_model has
            another format.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        target: Target,
        budget: Budget,
        searched: Texts,
        held_out: Texts,
        cost_tokens: int,
        folder: Path,
        *,
        prefill_model: str | None = None,
        command: str,
        progress: Progress = lambda doing, share: None,
        say: Say = lambda message: None,
    ) -> None:
        if shared := _beginnings(searched, held_out) & _beginnings(held_out, searched):
            raise WorkError(
                f"{len(shared)} of the texts of --held-out begin like texts of --text; give other texts"
            )
        self.checkpoint, self.target, self.budget = checkpoint, target, budget
        self.searched, self.held_out, self.cost_tokens = searched, held_out, cost_tokens
        self.prefill_model = prefill_model
        self.command, self.progress, self.say = command, progress, say
        self._check_prefill_model()
        self.work = Work(folder, self._what())
        self._references: dict[str, measure.Logits] = {}
        rows = searched.passages.prompt_tokens
        # At most half of a prompt's rows stay precise: a recipe tuned on more would suit short prompts
        # only.
        self.heads = tuple(head for head in HEADS if head <= rows // 4)
        self.tails = tuple(tail for tail in TAILS if tail <= rows // 4 or tail == 1)

    def run(self) -> Tuned:
        """Finds the recipe.

        Raises:
            ModelError, PrepareError: the model cannot be loaded, or not prepared.
            WorkError: the folder cannot be used, the prefill_model does not have all projections, or no
                recipe has so few bits.
        """
        self.progress("loading", 0.0)
        units, mixture = self._in_bf16(
            lambda model: (units_of(model, self.target.formats), _is_mixture(model))
        )
        if not len(units):
            formats = " or ".join(self.target.formats)
            raise WorkError(
                f"{self.checkpoint.name}: no layer has a shape that {formats} can store"
            )
        self._check_complete(units)
        cost = CostModel(units, self.target, self.cost_tokens)
        plain = Choice((self.target.plain,) * len(units), "6", 0, 1)
        self._check_bits(cost, plain)
        if mixture:
            self.say(
                f"Experts are measured in BF16 and left out of time and bits. vLLM on a GPU takes "
                f"{self.target.plain} for them, unless the recipe's 'ignore' has '*.experts*'"
            )
        self.progress("quantizing both phases, for comparison", 0.02)
        lost = {
            of: self._kl(plain, units, of, everywhere=True, stored=False)
            for of in ("searched", "held_out")
        }
        block_scale = self._block_scale(plain, units)
        predictor = self._predictor(units, block_scale)
        frontier = self._frontier(predictor, cost, block_scale)
        begun = replace(plain, block_scale=block_scale)
        first_ratio = self._kl(begun, units, "searched") / predictor.kl(begun)
        chosen, measured = self._decide(frontier, units, lost, first_ratio)
        return self._outcome(units, cost, predictor, plain, frontier, chosen, measured, lost)

    def _what(self) -> dict[str, object]:
        """What all of the work depends on; not the budget or the texts held out, so that other ones
        can reuse what was measured."""
        config = json.dumps(self.checkpoint.config, sort_keys=True, default=str).encode()
        what: dict[str, object] = {
            "mixquant": __version__,
            "model": self.checkpoint.source,
            "config": hashlib.sha256(config).hexdigest(),
            "weights": _files(Path(self.checkpoint.source)),
            "formats": sorted(self.target.formats),
            "plain": self.target.plain,
            "texts": _digest(self.searched),
        }
        if self.prefill_model is not None:
            what["prefill_model"] = [self.prefill_model, *_files(Path(self.prefill_model))]
        return what

    def _check_prefill_model(self) -> None:
        if self.prefill_model is None:
            return
        checkpoint, fmt = opened(self.prefill_model).checkpoint, self.target.plain
        if other := sorted(set(checkpoint.formats.values()) - {fmt}):
            raise WorkError(
                f"{self.prefill_model} has layers in {other[0]}; a prefill model for {self.target.name} "
                f"has them in {fmt} alone (mixquant quantize --format {fmt})"
            )
        check_fits(self.prefill_model, self.checkpoint.config, self.checkpoint.source)

    def _check_complete(self, units: Units) -> None:
        """Times are relative to all projections in the fastest format, so none may stay BF16."""
        if self.prefill_model is None:
            return
        source = opened(self.prefill_model)
        left = [unit.name for unit in units.chosen if source.format_of(unit.name) is None]
        if left:
            raise WorkError(
                f"{self.prefill_model} leaves {left[0]} in BF16 (layers so left: {len(left)}); quantize "
                "it without --ignore, and let tune choose what stays BF16"
            )

    def _check_bits(self, cost: CostModel, plain: Choice) -> None:
        """Before anything is measured: the frontier begins with the fewest bits."""
        if self.budget.kind != "bits":
            return
        smallest = min(self.target.formats, key=BITS.__getitem__)
        fewest = cost.bits(replace(plain, formats=(smallest,) * len(plain.formats)))
        if fewest > self.budget.value:
            raise WorkError(
                f"no recipe has {self.budget.value:g} bits or fewer: the fewest are "
                f"{math.ceil(fewest * 100) / 100:.2f}, with every layer in {smallest}"
            )

    def _recipe(self, choice: Choice, units: Units, stored: bool = True) -> Recipe:
        """The recipe of a choice; ``stored``: with the prefill model, if there is one."""
        recipe = choice.recipe(units, self.target.plain)
        return replace(recipe, prefill_model=self.prefill_model if stored else None)

    def _in_bf16(self, use: Callable[[Any], Any]) -> Any:
        return measure.in_bf16(self.checkpoint, use)

    def _kl(
        self,
        choice: Choice,
        units: Units,
        of: str,
        *,
        everywhere: bool = False,
        stored: bool = True,
    ) -> float:
        """The divergence of a choice on the texts searched on or held out, measured once."""
        recipe = self._recipe(choice, units, stored)
        texts = self.searched if of == "searched" else self.held_out
        what = [replace(recipe, everywhere=everywhere).to_dict(), _digest(texts)]
        said = json.dumps(what, sort_keys=True)

        def compute() -> float:
            if of not in self._references:
                self._references[of] = self._in_bf16(
                    lambda model: measure.logits(model, texts.passages)
                )
            return measure.kl(
                self.checkpoint,
                replace(recipe, everywhere=everywhere),
                texts.passages,
                self._references[of],
            )

        return self.work.number(hashlib.sha256(said.encode()).hexdigest()[:16], compute)

    def _block_scale(self, plain: Choice, units: Units) -> BlockScale:
        """The better of the two, which cost the same: as measured on the texts searched on.

        A prefill model has scales of its own. What is left of the choice is rows, which vLLM's kernels
        scale by 6 whatever the recipe says.
        """
        if self.target.plain != "nvfp4" or self.prefill_model is not None:
            return "6"
        self.progress("block scales", 0.06)
        scales: tuple[BlockScale, ...] = ("6", "4/6")
        of = {
            scale: self._kl(replace(plain, block_scale=scale), units, "searched")
            for scale in scales
        }
        self.say(
            f"block scales: KL {of['6']:.4f} with 6, {of['4/6']:.4f} with 4/6, nothing else done"
        )
        return min(scales, key=of.__getitem__)

    def _predictor(self, units: Units, block_scale: BlockScale) -> Predictor:
        """The sensitivities, a batch of texts at a time."""
        passages = self.searched.passages
        variants = tuple(
            variant
            for variant in variants_of(self.target.formats)
            if variant[0] != "nvfp4" or variant[1] == block_scale
        )
        borders = edges(passages.prompt_tokens, self.heads, self.tails)
        at_once = max(1, ROWS_WITH_GRADIENTS // passages.prompt_tokens)
        count = len(passages.prompts)
        samples = -(-DRAWS // count)
        batches = [range(first, min(first + at_once, count)) for first in range(0, count, at_once)]
        model: list[Any] = []

        def compute(batch: range, number: int) -> np.ndarray:
            def done(share: float) -> None:
                self.progress("sensitivities", 0.1 + 0.5 * (number + share) / len(batches))

            if not model:
                model.append(measure.load_model(self.checkpoint))
            some = Passages(
                passages.prompt_tokens,
                tuple(passages.prompts[text] for text in batch),
                tuple(passages.continuations[text] for text in batch),
            )
            return draw(
                model[0],
                units,
                some,
                variants,
                borders,
                samples,
                seed=batch.start,
                prefill_model=self.prefill_model,
                done=done,
            )

        drawn = []
        for number, batch in enumerate(batches):
            self.progress("sensitivities", 0.1 + 0.5 * number / len(batches))
            name = f"draws-{block_scale.replace('/', '-')}-{batch.start}-{batch.stop}-{samples}"
            drawn.append(self.work.array(name, partial(compute, batch, number)))
        model.clear()
        measure.free()
        draws = np.concatenate(drawn)
        if not np.isfinite(draws).all():
            raise WorkError(
                f"the gradients of {self.checkpoint.name} are not finite on the texts searched on; give "
                "other texts with --text"
            )
        return Predictor(draws, variants, tuple(borders))

    def _frontier(
        self, predictor: Predictor, cost: CostModel, block_scale: BlockScale
    ) -> list[FrontierPoint]:
        self.progress("searching", 0.6)
        if self.budget.kind == "bits":
            head = max(head for head in self.heads if head <= 4)
            return by_bits(predictor, cost, block_scale, head, 1)
        tails = [tail for tail in self.tails if tail <= self.cost_tokens]
        heads = [head for head in self.heads if head + max(tails) <= self.cost_tokens]
        return by_time(predictor, cost, block_scale, heads or [0], tails)

    def _decide(
        self,
        frontier: Sequence[FrontierPoint],
        units: Units,
        lost: Mapping[str, float],
        first_ratio: float,
    ) -> tuple[FrontierPoint, dict[str, dict[int, float]]]:
        """The point of the frontier to take, and what was measured: by kind of texts, by point."""
        measured: dict[str, dict[int, float]] = {"searched": {}, "held_out": {}}
        if self.budget.kind == "bits":
            taken = max(i for i, point in enumerate(frontier) if point.bits <= self.budget.value)
            for of in measured:
                measured[of][taken] = self._kl(frontier[taken].choice, units, of)
            return frontier[taken], measured
        for place, of in enumerate(("searched", "held_out")):
            limit = self.budget.limit(lost[of])
            assert limit is not None
            # Before anything is measured on these texts: plain's ratio, or those of the other texts.
            ratios = ratios_of(frontier, measured["searched"]) or {0: first_ratio}
            start = 0.62 + 0.19 * place

            def look(index: int, of: str = of, start: float = start) -> float:
                share = min(len(measured[of]) / MEASURED, 1)
                self.progress(f"measuring candidates, {_TEXTS[of]}", start + 0.19 * share)
                measured[of][index] = self._kl(frontier[index].choice, units, of)
                return measured[of][index]

            taken = cheapest_within(frontier, limit, ratios, look)
        # For the report: the chosen candidate may be measured on the held-out texts only.
        measured["searched"][taken] = self._kl(frontier[taken].choice, units, "searched")
        return frontier[taken], measured

    def _outcome(
        self,
        units: Units,
        cost: CostModel,
        predictor: Predictor,
        plain: Choice,
        frontier: Sequence[FrontierPoint],
        chosen: FrontierPoint,
        measured: Mapping[str, Mapping[int, float]],
        lost: Mapping[str, float],
    ) -> Tuned:
        self.progress("plain, on all texts", 0.98)
        arms: list[Arm] = []
        tried: list[Tried] = []

        def add(
            name: str,
            choice: Choice,
            searched: float | None,
            held_out: float | None,
            stored: bool = True,
            **known: Any,
        ) -> None:
            recipe = self._recipe(choice, units, stored)
            arms.append(
                Arm(name=name, recipe=replace(recipe, everywhere=name == QUANTIZED).to_dict())
            )
            found = {"time": cost.time(choice), "predicted": None, **known}
            tried.append(
                Tried(
                    arm=name,
                    bits=cost.bits(choice),
                    searched=searched,
                    held_out=held_out,
                    recovered=recovered(held_out, lost["held_out"]),
                    **found,
                )
            )

        add(QUANTIZED, plain, lost["searched"], lost["held_out"], stored=False, time=None)
        searched, held_out = (
            self._kl(plain, units, of, stored=False) for of in ("searched", "held_out")
        )
        begun = replace(plain, block_scale=chosen.choice.block_scale)
        predicted = predictor.kl(begun)
        if begun == plain and self.prefill_model is None:
            add("plain", plain, searched, held_out, predicted=predicted)
        else:  # nothing predicts plain: the sensitivities are those of other weights or scales
            add("plain", plain, searched, held_out, stored=False)
            name = "plain" if begun == plain else f"plain {begun.block_scale}"
            if self.prefill_model is not None:
                name += ", prefill model"
            add(name, begun, self._kl(begun, units, "searched"), None, predicted=predicted)
        number = 0
        for index in sorted({*measured["searched"], *measured["held_out"]}):
            point = frontier[index]
            number += point is not chosen
            add(
                "tuned" if point is chosen else f"candidate {number}",
                point.choice,
                measured["searched"].get(index),
                measured["held_out"].get(index),
                predicted=point.predicted,
            )
        results = Tuning(
            environment=Environment.here(),
            command=self.command,
            model=self.checkpoint.name,
            target=self.target.name,
            rates={fmt: self.target.rates[fmt] for fmt in (*self.target.formats, "bf16")},
            budget=self.budget.kind,
            at_most=self.budget.value,
            prompt_tokens=self.searched.passages.prompt_tokens,
            check_tokens=self.held_out.passages.prompt_tokens,
            cost_tokens=self.cost_tokens,
            texts=self.searched.names,
            held_out=self.held_out.names,
            arms=tuple(arms),
            tried=tuple(tried),
            frontier=tuple(
                Predicted(time=point.time, bits=point.bits, kl=point.predicted)
                for point in frontier
            ),
            rank=rank([(one.predicted, one.searched) for one in tried]),
        )
        return Tuned(self._recipe(chosen.choice, units), results)


def _is_mixture(model: Any) -> bool:
    return any(EXPERTS.search(name) for name, _ in model.named_modules())


def _digest(texts: Texts) -> str:
    said = json.dumps([texts.passages.prompts, texts.passages.continuations])
    return hashlib.sha256(said.encode()).hexdigest()


def _beginnings(of: Texts, other: Texts) -> set[tuple[int, ...]]:
    """The prompts, no longer than those of others."""
    return {prompt[: other.passages.prompt_tokens] for prompt in of.passages.prompts}


def _files(folder: Path) -> list[list[object]]:
    """The weight files of a directory, with what changes when they do; none for a name on the hub."""
    if not folder.is_dir():
        return []
    found = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in found]


_TEXTS = {"searched": "texts searched on", "held_out": "texts held out"}
