"""Where the time of a prefill goes, from a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from mixquant.report.derived import arms_of
from mixquant.report.parts import Panel, Table
from mixquant.report.plots import Stack, stacks
from mixquant.report.style import kinds_of_work
from mixquant.report.text import clauses, count, listed, number, percent
from mixquant.results import BASELINE, Piece


def breakdowns(pieces: Sequence[Piece]) -> tuple[Panel, ...]:
    """A panel for each prompt length."""
    return tuple(
        _breakdown(tokens, [piece for piece in pieces if piece.tokens == tokens])
        for tokens in sorted({piece.tokens for piece in pieces})
    )


def _breakdown(tokens: int, pieces: Sequence[Piece]) -> Panel:
    kinds = tuple(dict.fromkeys(piece.kind for piece in pieces))
    arms = arms_of(piece.arm for piece in pieces)
    ms = {(piece.arm, piece.kind): piece.ms for piece in pieces}
    totals = {arm: sum(ms.get((arm, kind), 0.0) for kind in kinds) for arm in arms}
    said = []
    for arm in arms:
        # Two kinds are what one remembers; the table has all.
        largest = sorted(kinds, key=lambda kind: ms.get((arm, kind), 0.0), reverse=True)[:2]
        shares = [
            f"{percent(ms.get((arm, kind), 0.0) / totals[arm])} {kind}"
            for kind in largest
            if totals[arm] > 0
        ]
        said.append(f"{arm} {number(totals[arm])} ms, of which {listed(shares)}")
    title = f"Where the time goes, {count(tokens)} prompt tokens"
    return Panel(
        title,
        _meaning(arms, kinds, ms),
        f"Sum and largest parts: {clauses(said)}.",
        partial(
            stacks,
            rows=[Stack(arm, tuple((k, ms.get((arm, k), 0.0)) for k in kinds)) for arm in arms],
            looks=kinds_of_work(kinds),
            x_label="ms, less is better",
        ),
        Table(
            f"{title}, ms",
            ("Arm", *kinds, "Sum"),
            tuple(
                (
                    arm,
                    *(number(ms[arm, kind]) if (arm, kind) in ms else "–" for kind in kinds),
                    number(totals[arm]),
                )
                for arm in arms
            ),
        ),
    )


def _meaning(arms: Sequence[str], kinds: Sequence[str], ms: Mapping[tuple[str, str], float]) -> str:
    """Which kind of work each arm saves most of, and which it adds."""
    said = []
    for arm in arms:
        if arm == BASELINE or BASELINE not in arms:
            continue
        change = {kind: ms.get((arm, kind), 0.0) - ms.get((BASELINE, kind), 0.0) for kind in kinds}
        least, most = (f(change, key=change.__getitem__) for f in (min, max))
        parts = [f"saves most in {least}"] if change[least] < 0 else []
        parts += [f"adds time for {most}"] if change[most] > 0 else []
        if parts:
            said.append(f"{arm} {listed(parts)}")
    closing = f" Against BF16, {clauses(said)}." if said else ""
    return f"A bar is the time of one prefill; its parts are kinds of work.{closing}"
