"""Ideas to bring a prefill in NVFP4 closer to BF16, each beside plain NVFP4 and the best simple recipe.

    python benchmarks/fidelity_ideas.py [--json FILE] [--texts N]
    python benchmarks/fidelity_ideas.py --show FILE

The ideas: a precise tail in proportion to the prompt; MXFP8 (E4M3 codes, blocks of 32, E8M0 scales)
in the place of FP8; the copy's weights rounded by GPTQ (arXiv 2210.17323) against quantized
activations; and the mean errors of projections, found in calibration and taken off.

The model is SmolLM2-135M, formats emulated. Texts are Python's documentation and modules of its library.
Other modules calibrate. What follows a prompt is measured as `mixquant fidelity` does.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from command_line import command_line
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from transformers.utils import logging as hf_logging

from mixquant.checkpoints.models import find, load_model, load_tokenizer
from mixquant.core.layer_names import STATE_WRITERS
from mixquant.core.phase import plan_in_force
from mixquant.core.recipe import Recipe
from mixquant.core.rows import Part, quantize_once
from mixquant.engines.transformers import phase, prepare
from mixquant.engines.transformers.module import PhaseLinear, phase_linears
from mixquant.evaluate.divergence import divergence
from mixquant.evaluate.fidelity.passages import documentation
from mixquant.formats import BY_NAME, EMULATION, Kernel, e2m1
from mixquant.formats.nvfp4 import NVFP4, NVFP4Weight, emulated_weight
from mixquant.formats.nvfp4_blocks import BLOCK

ANSWER = 64
LENGTHS = (512, 2048, 4096)  # of prompts, for tails
TAILS = (1, 32, 128)
SHARES = (64, 32, 16)  # tails of a 64th of the prompt, ...
PROMPT = 512  # for all other ideas

MEASURED = ("ast", "pickle", "subprocess", "tarfile")
CALIBRATION = ("argparse", "datetime", "inspect", "typing", "doctest", "enum")
CALIBRATION_TOKENS = 1024  # of each

HEAD = 4  # tokens that mean errors leave out: the first ones' values are many times the others'

Formats = Mapping[str, str]


@dataclass(frozen=True)
class MxFp8Weight:
    """A weight ``[N, K]`` in MXFP8, as the FP32 values that it stands for."""

    values: Tensor
    kernel: Kernel
    shape: tuple[int, int]
    nbytes: int


class _MxFp8:
    """MXFP8, emulated by torchao, as `mixquant.formats.base.Format` has it."""

    name = "mxfp8"

    def why_not(self, out_features: int, in_features: int, kernel: Kernel) -> str | None:
        return f"in_features {in_features} is no multiple of 32" if in_features % 32 else None

    def kernel(self, device: torch.device) -> Kernel:
        return EMULATION

    def quantize_rows(self, x: Tensor, kernel: Kernel) -> Tensor:
        """The FP32 values that the quantized rows stand for."""
        mode = ScaleCalculationMode.RCEIL  # what Blackwell's libraries do
        made = MXTensor.to_mx(x.float().contiguous(), torch.float8_e4m3fn, 32, mode)
        return made.dequantize(torch.float32)

    def quantize_weight(self, weight: Tensor, kernel: Kernel) -> MxFp8Weight:
        n, k = weight.shape
        values = self.quantize_rows(weight.detach(), kernel)
        return MxFp8Weight(values, kernel, (n, k), n * k + n * k // 32)

    def dequantize_weight(self, weight: MxFp8Weight) -> Tensor:
        return weight.values

    def linear(self, rows: Tensor, weight: MxFp8Weight, bias: Tensor | None, out: Tensor) -> None:
        out.copy_(F.linear(rows, weight.values, bias))


MXFP8 = _MxFp8()


def gptq(weight: Tensor, scales: Tensor, hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Rounds a weight one input at a time; the inputs that follow make up for the error so far.

    Inputs come by their size, the largest first, as scales are fixed before.

    Args:
        weight: ``[N, K]``.
        scales: ``[N, K/16]`` FP32, of NVFP4 blocks, tensor scale and all.
        hessian: ``[K, K]`` FP32, the sum of ``x x^T`` over activation rows x.
        damping: added to the diagonal, in units of its mean.

    Returns:
        E2M1 codes ``[N, K]`` uint8.
    """
    order = hessian.diagonal().argsort(descending=True)
    w = weight.float().T[order].contiguous()  # [K, N]
    scale = scales.repeat_interleave(BLOCK, dim=1).T[order].contiguous()
    damped = hessian[order][:, order]
    damped.diagonal().add_(damping * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty_like(w, dtype=torch.uint8)
    for rows in torch.arange(len(w)).split(128):  # one matrix product makes up for so many
        first, stop = int(rows[0]), int(rows[-1]) + 1
        errors = torch.empty_like(w[first:stop])
        for row in range(first, stop):
            codes[row] = e2m1.encode(torch.where(scale[row] > 0, w[row] / scale[row], 0))
            error = (w[row] - e2m1.decode(codes[row]) * scale[row]) / factor[row, row]
            w[row + 1 : stop] -= factor[row, row + 1 : stop, None] * error
            errors[row - first] = error
        w[stop:] -= factor[first:stop, stop:].T @ errors
    return codes[order.argsort()].T.contiguous()


@dataclass
class Calibration:
    """What the quantized rows of calibration texts are like, by layer.

    Attributes:
        hessians: ``[K, K]``, sums of ``x x^T`` over the rows x as quantized; of layers in NVFP4.
        errors: ``[N]``, mean differences between the layer's outputs and those of its own weight, from
            the same inputs.
    """

    hessians: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def calibrated(model: Any, texts: Sequence[Tensor]) -> Calibration:
    """Reads texts with a prepared model, in prefill."""
    found = Calibration()

    def watch(layer: PhaseLinear, args: tuple[Tensor], out: Tensor) -> None:
        plan = plan_in_force()
        assert plan is not None
        (x,), part = args, layer.parts[0]
        rows = slice(max(plan.quantized[0][0], HEAD), plan.quantized[0][1])
        difference = out[0, rows] - F.linear(x[0, rows], layer.weight)
        error = difference.float().mean(dim=0) / len(texts)
        found.errors[layer.name] = found.errors.get(layer.name, 0) + error
        if isinstance(part.weight, NVFP4Weight):
            encoded = quantize_once(x, plan, "nvfp4", part.weight.kernel, part.options)
            values = NVFP4.dequantize_rows(encoded)
            found.hessians[layer.name] = found.hessians.get(layer.name, 0) + values.T @ values

    hooks = [layer.register_forward_hook(watch) for layer in phase_linears(model)]
    for text in texts:
        with phase("prefill"):
            model(input_ids=text[None], use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return found


def round_by_gptq(model: Any, calibration: Calibration) -> None:
    """Replaces the NVFP4 copies of a prepared model; their block scales stay."""

    def rounded(layer: PhaseLinear, old: NVFP4Weight) -> NVFP4Weight:
        scales = old.block_scales.float() * old.tensor_scale
        codes = gptq(layer.weight.detach(), scales, calibration.hessians[layer.name])
        return emulated_weight(e2m1.pack(codes), old.block_scales, old.tensor_scale)

    _replace_nvfp4(model, rounded)


def keep_exact(model: Any) -> None:
    """Gives the NVFP4 copies of a prepared model the weights as they are: what no rounding can pass."""
    _replace_nvfp4(
        model,
        lambda layer, old: replace(
            old, unscaled=layer.weight.detach(), tensor_scale=torch.ones_like(old.tensor_scale)
        ),
    )


def _replace_nvfp4(model: Any, made: Callable[[PhaseLinear, NVFP4Weight], NVFP4Weight]) -> None:
    for layer in phase_linears(model):
        (part,) = layer.parts
        if isinstance(part.weight, NVFP4Weight):
            layer.set_copy((replace(part, weight=made(layer, part.weight)),))


@contextmanager
def mean_errors_taken_off(
    model: Any, calibration: Calibration, projections: Sequence[str] | None = None
) -> Iterator[None]:
    """Inside the block quantized rows of these projections, or of all, lose their mean error."""

    def corrected(layer: PhaseLinear, args: tuple[Tensor], out: Tensor) -> Tensor:
        plan = plan_in_force()
        result = out.clone()
        for start, stop in plan.quantized if plan else ():
            result[0, max(start, HEAD) : stop] -= calibration.errors[layer.name]
        return result

    hooks = [
        layer.register_forward_hook(corrected)
        for layer in phase_linears(model)
        if projections is None or layer.name.rpartition(".")[2] in projections
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def read(
    model: Any, text: Tensor, points: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Tensor]:
    """What follows prompts that are the beginnings of one text.

    The text is read once. What its quantized rows leave in the cache is the same for each prompt and
    tail, up to where the tail begins.

    Args:
        model: with a precise tail of no token, or not prepared.
        points: lengths of prompts, each with its precise tail, in tokens.

    Returns:
        Logits ``[ANSWER, V]`` by point.
    """
    longest = max(length for length, _ in points)
    with phase("prefill"):
        output = model(input_ids=text[None, :longest], use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    found = {}
    for length, tail in sorted(points, key=lambda point: point[1] - point[0]):
        start = length - tail
        cache.crop(start - cache.get_seq_length())
        output = model(
            input_ids=text[None, start : length + ANSWER - 1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=ANSWER,
        )
        found[length, tail] = output.logits[0]
    return found


@dataclass(frozen=True)
class Base:
    """What ideas are added to."""

    formats: Formats
    block_scale: str
    precise_head: int

    def prepared(self, **others: str) -> Any:
        """The model under this recipe, some projections in other formats, MXFP8 among them."""
        formats = {"default": "nvfp4", **self.formats, **others}
        recipe = {
            "format": {name: "fp8" if fmt == "mxfp8" else fmt for name, fmt in formats.items()},
            "block_scale": self.block_scale,
            "precise_head": self.precise_head,
            "precise_tail": 0,  # `read` leaves the tail to passes of its own
            "min_prefill_tokens": 0,
            "emulate": True,
            "prefill_attention": "bf16",  # what is measured is products
        }
        model = prepare(load_model(find("smollm2")), Recipe.from_dict(recipe))
        for layer in phase_linears(model):
            name = layer.name.rpartition(".")[2]
            if formats.get(name, formats["default"]) == "mxfp8":
                weight = MXFP8.quantize_weight(layer.weight, EMULATION)
                layer.set_copy((Part((0, len(layer.weight)), MXFP8.name, weight),))
        return model


def states(fmt: str) -> dict[str, str]:
    """Keys and values in a format."""
    return dict.fromkeys(STATE_WRITERS, fmt)


PLAIN, BEST = "plain NVFP4", "best: K, V in FP8, 4/6, 4 head rows"
BASES = {PLAIN: Base({}, "6", 0), BEST: Base(states("fp8"), "4/6", HEAD)}
IN_FORMATS: dict[str, dict[str, dict[str, str]]] = {
    PLAIN: {
        "K, V in FP8": states("fp8"),
        "K, V in MXFP8": states("mxfp8"),
        "all in FP8": {"default": "fp8"},
        "all in MXFP8": {"default": "mxfp8"},
    },
    BEST: {
        "K, V in MXFP8": states("mxfp8"),
        "down_proj in FP8": {"down_proj": "fp8"},
        "down_proj in MXFP8": {"down_proj": "mxfp8"},
    },
}


Divergences = Callable[[Any, Sequence[tuple[int, int]]], dict[tuple[int, int], list[float]]]


def against_bf16(texts: Sequence[Tensor], lengths: Sequence[int]) -> Divergences:
    """What measures a prepared model: for each point the mean KL of each text, in nats per token."""
    model = load_model(find("smollm2"))
    expected = [read(model, text, [(length, 1) for length in lengths]) for text in texts]
    del model

    def measure(
        model: Any, points: Sequence[tuple[int, int]]
    ) -> dict[tuple[int, int], list[float]]:
        found: dict[tuple[int, int], list[float]] = {point: [] for point in points}
        for text, wanted in zip(texts, expected, strict=True):
            for point, logits in read(model, text, points).items():
                kl, _ = divergence(wanted[point[0], 1], logits)
                found[point].append(kl.mean().item())
        return found

    return measure


Row = dict[str, Any]


def tails(texts: Sequence[Tensor], done: Sequence[Row]) -> Iterator[Row]:
    """A row of results for each base, prompt length and precise tail, those that are done among them."""
    points = {(length, tail) for length in LENGTHS for tail in TAILS}
    points |= {(length, length // part) for length in LENGTHS for part in SHARES}
    measure = functools.cache(lambda: against_bf16(texts, LENGTHS))
    for name, base in BASES.items():
        known = [row for row in done if row["base"] == name]
        if len(known) == len(points):
            yield from known
            continue
        for (length, tail), kl in measure()(base.prepared(), sorted(points)).items():
            yield {"base": name, "prompt": length, "tail": tail, "kl": kl}


def models(
    base: Base, in_formats: Mapping[str, Formats], texts: Sequence[Tensor]
) -> dict[str | None, Callable[[], AbstractContextManager[Any]]]:
    """By idea, what makes the model that has it, for the time of a block.

    Args:
        in_formats: ideas that are other formats.
        texts: of the calibration.
    """
    seen = functools.cache(lambda: calibrated(base.prepared(), texts))

    @contextmanager
    def corrected(projections: Sequence[str] | None = None) -> Iterator[Any]:
        model = base.prepared()
        with mean_errors_taken_off(model, seen(), projections):
            yield model

    @contextmanager
    def rounded() -> Iterator[Any]:
        model = base.prepared()
        round_by_gptq(model, seen())
        yield model

    @contextmanager
    def rounded_and_corrected() -> Iterator[Any]:
        with rounded() as model, mean_errors_taken_off(model, calibrated(model, texts)):
            yield model

    @contextmanager
    def exact() -> Iterator[Any]:
        model = base.prepared()
        keep_exact(model)
        yield model

    @contextmanager
    def plain(formats: Formats) -> Iterator[Any]:
        yield base.prepared(**formats)

    made: dict[str | None, Callable[[], AbstractContextManager[Any]]] = {
        None: partial(plain, {}),
        "mean errors of K, V taken off": partial(corrected, STATE_WRITERS),
        "mean errors of all taken off": corrected,
        "weights rounded by GPTQ": rounded,
    }
    if (
        base == BASES[PLAIN]
    ):  # what GPTQ and corrections have in common, and what no rounding passes
        made["GPTQ, then mean errors of all taken off"] = rounded_and_corrected
        made["weights not rounded"] = exact
    return made | {idea: partial(plain, formats) for idea, formats in in_formats.items()}


def ideas(
    texts: Sequence[Tensor], calibration: Sequence[Tensor], done: Sequence[Row]
) -> Iterator[Row]:
    """A row of results for each base and idea, those that are done among them."""
    measure = functools.cache(lambda: against_bf16(texts, [PROMPT]))
    known = {(row["base"], row["idea"]): row for row in done}
    for name, base in BASES.items():
        for idea, made in models(base, IN_FORMATS[name], calibration).items():
            if (name, idea) in known:
                yield known[name, idea]
                continue
            with made() as model:
                (kl,) = measure()(model, [(PROMPT, 1)]).values()
            yield {"base": name, "idea": idea, "kl": kl}


def share(kl: Sequence[float], of: Sequence[float]) -> tuple[float, float]:
    """A mean as a share of another over the same texts, and its standard error (jackknife)."""
    some, every = torch.tensor(kl, dtype=torch.float64), torch.tensor(of, dtype=torch.float64)
    without = (some.sum() - some) / (every.sum() - every)
    error = without.std(correction=0) * (len(kl) - 1) ** 0.5
    return (some.sum() / every.sum()).item(), error.item()


def shown(kl: Sequence[float]) -> str:
    """A mean and its standard error."""
    values = torch.tensor(kl, dtype=torch.float64)
    return f"{values.mean():.4f} ± {values.std() / len(kl) ** 0.5:.4f}"


def shown_share(kl: Sequence[float], of: Sequence[float]) -> str:
    value, error = share(kl, of)
    return f"{value:.2f} ± {error:.2f}"


def table_of_tails(rows: Sequence[Row]) -> str:
    """KL by tail and length of the prompt, as a share of plain NVFP4's with a tail of one row."""
    kl = {(row["base"], row["prompt"], row["tail"]): row["kl"] for row in rows}
    heads = [f"{length} tokens" for length in LENGTHS]
    lines = [f"| recipe | precise tail | {' | '.join(heads)} |", "| --- " * 5 + "|"]
    plain = [shown(kl[PLAIN, length, 1]) for length in LENGTHS]
    lines.append(f"| {PLAIN} | 1, KL in nats | {' | '.join(plain)} |")
    for base in dict.fromkeys(row["base"] for row in rows):
        chosen = {str(tail): [tail] * len(LENGTHS) for tail in TAILS}
        chosen |= {f"1/{part} of the prompt": [n // part for n in LENGTHS] for part in SHARES}
        for said, of_each in chosen.items():
            if (base, said) == (PLAIN, "1"):
                continue
            cells = [
                shown_share(kl[base, length, tail], kl[PLAIN, length, 1])
                for length, tail in zip(LENGTHS, of_each, strict=True)
            ]
            lines.append(f"| {base} | {said} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_ideas(rows: Sequence[Row]) -> str:
    """KL by idea, and as a share of that of what the idea is added to."""
    bases = {row["base"]: row["kl"] for row in rows if row["idea"] is None}
    lines = ["| arm | KL | share of plain NVFP4's | share of its base's |", "| --- " * 4 + "|"]
    for row in rows:
        kl, base = row["kl"], row["base"]
        arm = base if row["idea"] is None else f"{base.partition(':')[0]}, {row['idea']}"
        of_base = "-" if row["idea"] is None else shown_share(kl, bases[base])
        lines.append(f"| {arm} | {shown(kl)} | {shown_share(kl, bases[PLAIN])} | {of_base} |")
    return "\n".join(lines)


def tables(found: dict[str, Any]) -> str:
    return f"{table_of_tails(found['tails'])}\n\n{table_of_ideas(found['ideas'])}"


def modules(names: Sequence[str]) -> dict[str, str]:
    """The sources of modules of Python's library."""
    folder = Path(sysconfig.get_path("stdlib"))
    return {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=8, help="of the documentation")
    parser.add_argument("--json", type=Path, help="where the results go; what it has is kept")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a --json file's tables")
    options = parser.parse_args()
    if options.show:
        print(tables(json.loads(options.show.read_text())))
        return
    hf_logging.disable_progress_bar()
    BY_NAME[MXFP8.name] = MXFP8
    tokenizer = load_tokenizer(find("smollm2"))

    def tokens(texts: Mapping[str, str], count: int) -> list[Tensor]:
        return [torch.tensor(tokenizer(text)["input_ids"][:count]) for text in texts.values()]

    pages = documentation(options.texts)
    measured = {**pages, **modules(MEASURED)}
    found: dict[str, Any] = {
        "command": command_line(options.json),
        "python": sys.version.split()[0],
        "texts": list(measured),
        "calibration": list(CALIBRATION),
        "answer_tokens": ANSWER,
    }
    before = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    if found.items() <= before.items():
        found = before
    begin = time.monotonic()
    short, calibration = tokens(measured, PROMPT + ANSWER), modules(CALIBRATION)
    done = {key: found.setdefault(key, []) for key in ("ideas", "tails")}
    every = {
        "ideas": ideas(short, tokens(calibration, CALIBRATION_TOKENS), done["ideas"]),
        "tails": tails(tokens(pages, max(LENGTHS) + ANSWER), done["tails"]),
    }
    for key, rows in every.items():
        so_far: list[Row] = []
        for row in rows:
            so_far.append(row)
            found[key] = so_far + [other for other in done[key] if other not in so_far]
            said = {name: value for name, value in row.items() if name != "kl"}
            seconds = time.monotonic() - begin
            print(f"{seconds:.0f} s: {said} {shown(row['kl'])}", file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(tables(found))


if __name__ == "__main__":
    main()
