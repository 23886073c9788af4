"""How much each projection's quantization moves the answers: to first order, all from a few passes.

Quantizing a projection adds an error e to its output. To first order the answer's logits move by J e,
and the divergence from BF16 is half the Fisher norm of that, which is the mean of (g . e)^2 / 2 over
answers that the model itself would give, where g is the gradient of the answer's log-likelihood with
respect to the projection's output. One backward pass gives g at every projection, so one text and one
drawn answer give g . e of every projection in every format. The products are kept by groups of prompt
positions: a precise row has no error, so the first and last tokens' share is known, too. Errors of
several projections add up before the square.

What this leaves out is all that grows faster than the square of an error; `run` measures candidates
and says how far the predictions were off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixquant.engines.transformers.module import quantize_parts
from mixquant.evaluate.fidelity.passages import Passages
from mixquant.formats import BY_NAME
from mixquant.tune.units import Units

Variant = tuple[str, str]
"""A format, and for NVFP4 a block scale."""


def variants_of(formats: Sequence[str]) -> tuple[Variant, ...]:
    return tuple(
        (fmt, scale) for fmt in formats for scale in (("6", "4/6") if fmt == "nvfp4" else ("6",))
    )


def edges(prompt_tokens: int, heads: Sequence[int], tails: Sequence[int]) -> list[int]:
    """Borders of groups of positions, chosen so that every head and tail is a whole number of groups."""
    return sorted({*heads, *(prompt_tokens - tail for tail in tails), prompt_tokens})


def draw(
    model: Any,
    units: Units,
    texts: Passages,
    variants: Sequence[Variant],
    borders: Sequence[int],
    samples: int,
    seed: int,
    prefill_model: str | None = None,
    done: Callable[[float], None] = lambda share: None,
) -> np.ndarray:
    """The products g . e of some texts, which are read in one batch.

    Args:
        model: not prepared.
        borders: of the groups of prompt positions, from `edges`.
        samples: how many answers are drawn for each text.
        seed: of the drawing.
        prefill_model: the checkpoint that weights are taken from in the format that it has them in.
        done: is told after each answer what share of them is drawn, 0 to 1.

    Returns:
        ``[texts * samples, units, variants, groups]`` FP32, scaled so that the predicted divergence, in
        nats per answer token, is the mean over the first axis of the squared sum over units and groups.
    """
    device, rows, count = model.device, texts.prompt_tokens, len(texts.prompts)
    groups, answer = len(borders) - 1, len(texts.continuations[0])
    members: dict[str, list[int]] = {}
    for index, unit in enumerate(units.chosen):
        members.setdefault(unit.layer, []).append(index)
    found = np.zeros((count, samples, len(units), len(variants), groups), dtype=np.float32)
    of_row = np.searchsorted(borders, np.arange(rows), side="right") - 1
    group = torch.from_numpy(of_row + groups * np.arange(count)[:, None]).to(device).flatten()
    errors: dict[str, list[Tensor]] = {}
    sample = 0

    def keep(name: str, linear: nn.Linear, args: Any, out: Tensor) -> None:
        x, y = (one.detach()[:, :rows].flatten(0, 1) for one in (args[0], out))
        errors[name] = [_error(name, linear, x, y, variant, prefill_model) for variant in variants]
        out.register_hook(lambda gradient: collect(name, gradient))

    def collect(name: str, gradient: Tensor) -> None:
        along = gradient[:, :rows].flatten(0, 1).float()
        for index in members[name]:
            start, stop = units.chosen[index].features
            for number, error in enumerate(errors[name]):
                by_row = torch.linalg.vecdot(along[:, start:stop], error[:, start:stop].float())
                sums = torch.zeros(count * groups, device=device).index_add_(0, group, by_row)
                found[:, sample, index, number] = sums.view(count, groups).cpu().numpy()

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda linear, args, out, name=name: keep(name, linear, args, out)
        )
        for name in members
    ]
    tokens = torch.tensor(
        [
            [*prompt, *continuation[:-1]]
            for prompt, continuation in zip(texts.prompts, texts.continuations, strict=True)
        ],
        device=device,
    )
    generator = torch.Generator().manual_seed(seed)
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        with torch.enable_grad():
            output = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=answer)
            log_p = output.logits.float().log_softmax(dim=-1).flatten(0, 1)
            chances = log_p.detach().exp().cpu()
            for sample in range(samples):
                drawn = torch.multinomial(chances, 1, generator=generator).to(device)
                log_p.gather(-1, drawn).sum().backward(retain_graph=sample + 1 < samples)
                done((sample + 1) / samples)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in wanted:
            parameter.requires_grad_(before)
    found /= np.float32(np.sqrt(2 * answer))
    return found.reshape(-1, *found.shape[2:])


@torch.no_grad()
def _error(
    layer: str, linear: nn.Linear, x: Tensor, y: Tensor, variant: Variant, prefill_model: str | None
) -> Tensor:
    """What quantizing adds to the output of rows: ``[rows, N]`` in the type of ``y``."""
    name, block_scale = variant
    options = {"block_scale": block_scale} if name == "nvfp4" else {}
    layout = (((0, len(linear.weight)), name, options),)
    (part,) = quantize_parts(linear.weight, layout, layer, prefill_model)
    assert part.weight is not None, "units can be held in each format"
    fmt = BY_NAME[name]
    out = torch.empty_like(y, dtype=torch.float32)
    rows = fmt.quantize_rows(x, part.weight.kernel, **options)
    fmt.linear(rows, part.weight, linear.bias, out)
    return (out - y).to(y.dtype)
