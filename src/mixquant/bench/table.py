"""The figures for people: one table for each workload, the arms below one another."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mixquant.bench.summary import gains, reference_of
from mixquant.results import Measurement

TITLES = {
    "length": "By prompt length, one request at a time",
    "batch": "By batch size, all requests at once",
    "concurrency": "By concurrency, the next request when one is answered",
    "agent": "Agent trace, sessions at a time",
}

# Metrics, their headings, and whether the range is shown.
_COLUMNS = (
    ("ttft", "TTFT ms", True),
    ("tpot", "TPOT ms", False),
    ("itl", "ITL ms", False),
    ("total", "tok/s", False),
)
_SHARES = (("quantized", "quant."), ("cached", "cached"))


def tables(found: Sequence[Measurement]) -> list[Table]:
    """A table for each workload that was measured.

    Beside each median stands how many times as fast as the reference it is, and after times to
    first token, in brackets, the lowest and the highest.
    """
    names = list(dict.fromkeys(figure.workload for figure in found))
    return [_table(workload, found) for workload in names]


def _table(workload: str, found: Sequence[Measurement]) -> Table:
    own = [figure for figure in found if figure.workload == workload]
    by_key = {(f.arm, f.tokens, f.concurrency, f.metric): f for f in own}
    gained = gains(own)
    reference = reference_of(dict.fromkeys(figure.arm for figure in own))
    metrics = {figure.metric for figure in own}
    shown = [column for column in _COLUMNS if column[0] in metrics]
    shares = [column for column in _SHARES if column[0] in metrics]

    table = Table(
        title=TITLES.get(workload, workload), title_justify="left", box=None, pad_edge=False
    )
    table.add_column("tokens", justify="right")
    if workload != "length":
        table.add_column("at once", justify="right")
    table.add_column("arm")
    for _, heading, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
    for _, heading in shares:
        table.add_column(heading, justify="right")

    before = None
    for arm, tokens, concurrency in dict.fromkeys(
        (f.arm, f.tokens, f.concurrency) for f in _sorted(own)
    ):
        point = (tokens, concurrency)
        place = ["", ""] if point == before else [str(tokens), str(concurrency)]
        cells = [*(place if workload != "length" else place[:1]), arm]
        for metric, _, ranged in shown:
            figure = by_key.get((arm, *point, metric))
            gain = gained.get((arm, workload, *point, metric))
            cells.append("–" if figure is None else _number(figure, ranged))
            cells.append("" if gain is None or arm == reference else f"{gain:.2f}x")
        for metric, _ in shares:
            figure = by_key.get((arm, *point, metric))
            cells.append("–" if figure is None else f"{100 * figure.value:.0f}%")
        table.add_row(*cells)
        before = point
    return table


def _sorted(found: Sequence[Measurement]) -> list[Measurement]:
    """Point by point, the arms of each in the order in which they were run."""
    order = {arm: place for place, arm in enumerate(dict.fromkeys(f.arm for f in found))}
    return sorted(found, key=lambda f: (f.tokens, f.concurrency, order[f.arm]))


def _number(figure: Measurement, ranged: bool) -> str:
    text = _digits(figure.value)
    if ranged and figure.lowest is not None and figure.highest is not None:
        text += f" [dim]({_digits(figure.lowest)}-{_digits(figure.highest)})[/dim]"
    return text


def _digits(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
