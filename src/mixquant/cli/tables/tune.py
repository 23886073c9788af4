"""A tuned recipe as a table for a terminal: what was tried."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from mixquant.results import Tried, Tuning

_CAPTION = (
    "Time: a prefill's products at {tokens} tokens by the cost model, relative to plain (every layer in "
    "the fastest format). Bits: mean of a multiplied weight. KL: from bf16, in nats per token of the "
    "texts' own continuations; predicted from sensitivities, measured on the texts searched on, and on "
    "those held out. Recovered: the share won back of the KL of quantizing both phases, on the texts "
    "held out."
)


def tables(result: Tuning) -> Iterator[Table]:
    """One table of what was measured."""
    table = Table(
        title=f"{result.model} for {result.target}: {_budget(result)}, prompts of {_lengths(result)}",
        title_justify="left",
        caption=_caption(result),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("\narm", overflow="fold")
    for heading in ("\ntime", "\nbits", "KL\npred.", "\nsearched", "\nheld out", "\nrecovered"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in result.tried:
        table.add_row(*_row(one), style="bold" if one.arm == "tuned" else None)
    yield table


def _row(one: Tried) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        one.arm,
        shown(one.time, ".3f"),
        f"{one.bits:.2f}",
        shown(one.predicted, ".4f"),
        shown(one.searched, ".4f"),
        shown(one.held_out, ".4f"),
        shown(one.recovered, ".1%"),
    )


def _lengths(result: Tuning) -> str:
    searched, checked = result.prompt_tokens, result.check_tokens
    if checked in (None, searched):
        return f"{searched} tokens"
    return f"{searched} tokens searched on, of {checked} held out"


def _budget(result: Tuning) -> str:
    match result.budget:
        case "kl":
            return f"KL at most {result.at_most:g}"
        case "recovered":
            return f"at least {result.at_most:.1%} recovered"
        case "bits":
            return f"at most {result.at_most:g} bits"


def _caption(result: Tuning) -> str:
    notes = [_CAPTION.format(tokens=result.cost_tokens)]
    ratios = [
        one.searched / one.predicted for one in result.tried if one.predicted and one.searched
    ]
    if ratios:
        said = f"Measured over predicted: {min(ratios):.2g} to {max(ratios):.2g}"
        if result.rank is not None:
            said += f"; rank correlation {result.rank:.2f}"
        notes.append(f"{said}.")
    return "\n".join(notes)
