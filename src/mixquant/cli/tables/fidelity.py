"""Fidelity as tables for a terminal: what arms cost and how far they are from BF16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from mixquant.cli.hints import why_nothing_quantized
from mixquant.results import Divergence, Fidelity

_CAPTION = (
    "In, bits: the formats of a quantized row, by share of the multiply-adds in linear layers, and the "
    "mean bits of a multiplied weight. Rows: the share of the prompt that was quantized. KL: "
    "from bf16, in nats per token of the texts' own continuation; the mean, what 99 % stay below, "
    "and the largest. Perpl.: of that continuation. Same: tokens of the arm's own greedy answer "
    "until one is not bf16's."
)


def tables(result: Fidelity) -> Iterator[Table]:
    """For each prompt length: cost and fidelity of each arm. Then all lengths side by side, and how the
    KL fades after each prompt."""
    lengths = list(dict.fromkeys(one.prompt_tokens for one in result.results))
    for length in lengths:
        here = [one for one in result.results if one.prompt_tokens == length]
        yield _figures(result, here, _CAPTION if length == lengths[-1] else None)
    if len(lengths) > 1:
        yield _by_length(result, sorted(lengths))
    for length in lengths:
        here = [one for one in result.results if one.prompt_tokens == length]
        if len(here) > 1:
            yield _fading(here)


def _figures(result: Fidelity, here: Sequence[Divergence], caption: str | None) -> Table:
    first = here[0]
    prompts = "1 prompt" if first.answers == 1 else f"{first.answers} prompts"
    table = _table(
        f"{result.model} ({result.engine}): {prompts} of {first.prompt_tokens} tokens, "
        f"{first.greedy_tokens} compared after each"
    )
    unknown = "-: vLLM's arguments decide, so the formats are not known."
    known = {cost.arm for cost in result.costs}
    others = caption is not None and any(arm.name not in known for arm in result.arms)
    notes = (_nothing_quantized(result, here), caption or "", unknown * others)
    table.caption = "\n".join(note for note in notes if note) or None
    table.add_column("\narm", overflow="fold")
    table.add_column("\nin")
    headings = ("\nbits", "\nrows", "KL\nmean", "\n99 %", "\nmax", "\ntop-1", "\nperpl.", "\nsame")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    costs = {cost.arm: cost for cost in result.costs}
    for one in here:
        cost = costs.get(one.arm)  # none of arms without mixquant
        table.add_row(
            one.arm,
            "-" if cost is None else _shares(cost.share),
            "-" if cost is None else f"{cost.bits:.1f}",
            "-" if cost is None else f"{one.quantized_share:.1%}",
            f"{one.kl_mean:.4f}",
            f"{one.kl_p99:.3f}",
            f"{one.kl_max:.3f}",
            f"{one.top1:.1%}",
            f"{one.perplexity:.2f}",
            f"{one.identical_tokens:.1f}",
        )
    return table


def _nothing_quantized(result: Fidelity, here: Sequence[Divergence]) -> str:
    """A sentence on the arms that read these prompts as bf16 does."""
    reference = here[0].arm
    recipes = {arm.name: arm.recipe for arm in result.arms}
    reasons: dict[str, list[str]] = {}
    for one in here:
        if one.arm != reference and one.quantized_share == 0 and recipes.get(one.arm):
            why = why_nothing_quantized(recipes[one.arm], one.prompt_tokens)
            reasons.setdefault(why, []).append(one.arm)
    return " ".join(
        f"{' and '.join(arms)} quantized no prompt token: {why}." for why, arms in reasons.items()
    )


def _by_length(result: Fidelity, lengths: Sequence[int]) -> Table:
    table = _table("KL and top-1 by prompt length, in tokens")
    table.min_width = 42  # of the title
    table.add_column("arm", overflow="fold")
    for length in lengths:
        table.add_column(str(length), justify="right", no_wrap=True)
    found = {(one.arm, one.prompt_tokens): one for one in result.results}
    reference = result.results[0].arm
    for arm in dict.fromkeys(one.arm for one in result.results):
        if arm == reference:
            continue
        cells = (found.get((arm, length)) for length in lengths)
        table.add_row(
            arm, *("-" if one is None else f"{one.kl_mean:.4f}\n{one.top1:.1%}" for one in cells)
        )
    return table


def _fading(here: Sequence[Divergence]) -> Table:
    reference, *others = here
    table = _table(f"KL by place after a prompt of {reference.prompt_tokens} tokens")
    table.add_column("arm", overflow="fold")
    starts = [position.first for position in reference.by_position]
    for first, after in zip(starts, [*starts[1:], reference.greedy_tokens + 1], strict=True):
        heading = str(first) if after == first + 1 else f"{first}-{after - 1}"
        table.add_column(heading, justify="right", no_wrap=True)
    for one in others:
        table.add_row(one.arm, *(f"{position.kl_mean:.4f}" for position in one.by_position))
    return table


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )


def _shares(share: dict[str, float]) -> str:
    if len(share) == 1:
        return next(iter(share))
    largest = sorted(share.items(), key=lambda item: -item[1])
    return "\n".join(f"{name} {part:.0%}" for name, part in largest)
