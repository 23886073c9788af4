"""Fidelity as tables for a terminal: what arms cost and how far they are from BF16."""

from __future__ import annotations

from rich import box
from rich.table import Table

from mixquant.results import Fidelity


def table(result: Fidelity) -> Table:
    """The arms by prompt length, one a line, with the cost beside the fidelity."""
    first = result.results[0]
    table = Table(
        title=f"{result.model}: {first.answers} texts, {first.greedy_tokens} tokens after each prompt"
        f" ({result.engine})",
        title_justify="left",
        caption="KL: from bf16, in nats per token of the texts' own continuation; mean, what 99 % of "
        "the tokens stay below, and the largest. Perplexity: of that continuation. Same: how many "
        "tokens of the own greedy answer are those of bf16 before the first other one. Prefill in: "
        "of the multiply-adds in linear layers. Bits: of a multiplied weight, mean. Rows: of the "
        "prompt tokens, those quantized.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("\nprompt", justify="right", no_wrap=True)
    table.add_column("\narm", no_wrap=True)
    table.add_column("prefill\nin")
    for heading in (
        "\nbits",
        "\nrows",
        "KL\nmean",
        "\n99 %",
        "\nmax",
        "\ntop-1",
        "perple-\nxity",
        "\nsame",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    costs = {cost.arm: cost for cost in result.costs}
    for length in dict.fromkeys(one.prompt_tokens for one in result.results):
        for one in result.results:
            if one.prompt_tokens != length:
                continue
            cost = costs[one.arm]
            table.add_row(
                str(length) if one.arm == result.results[0].arm else "",
                one.arm,
                _shares(cost.share),
                f"{cost.bits:.1f}",
                f"{one.quantized_share:.1%}",
                f"{one.kl_mean:.4f}",
                f"{one.kl_p99:.3f}",
                f"{one.kl_max:.3f}",
                f"{one.top1:.1%}",
                f"{one.perplexity:.3f}",
                f"{one.identical_tokens:.1f}",
            )
        table.add_section()
    return table


def fading(result: Fidelity) -> Table:
    """The mean KL by the distance from the prompt's end, where it lies in groups that double."""
    table = Table(
        title="KL by place after the prompt's end", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("prompt", justify="right", no_wrap=True)
    table.add_column("arm", no_wrap=True)
    places = [position.first for position in result.results[0].by_position]
    last = result.results[0].greedy_tokens
    for first, after in zip(places, [*places[1:], last + 1], strict=True):
        heading = str(first) if after == first + 1 else f"{first}-{after - 1}"
        table.add_column(heading, justify="right", no_wrap=True)
    reference = result.results[0].arm
    for length in dict.fromkeys(one.prompt_tokens for one in result.results):
        others = [
            one for one in result.results if one.prompt_tokens == length and one.arm != reference
        ]
        for number, one in enumerate(others):
            table.add_row(
                "" if number else str(length),
                one.arm,
                *(f"{position.kl_mean:.4f}" for position in one.by_position),
            )
        table.add_section()
    return table


def _shares(share: dict[str, float]) -> str:
    if len(share) == 1:
        return next(iter(share))
    return " ".join(f"{part:.0%} {name}" for name, part in sorted(share.items(), key=_largest))


def _largest(item: tuple[str, float]) -> float:
    return -item[1]
