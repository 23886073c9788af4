"""What `mixquant compare` found, as plots."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mixquant.report.derived import BASELINE, ratio
from mixquant.report.parts import KeyFigure, Panel, Section, Table
from mixquant.report.plots import Bar, bars
from mixquant.report.style import looks
from mixquant.report.text import clauses, count, number, percent, times
from mixquant.results import ComparedArm, Comparison


def section(comparison: Comparison) -> Section:
    """Speed and fidelity of each arm, side by side, and what it answered."""
    arms = comparison.arms
    notes = []
    if not comparison.native:
        notes.append(
            f"{comparison.format} is emulated here ({comparison.kernel}): its times say nothing."
        )
    return Section(
        title="Comparison in three arms" if len(arms) == 3 else "Comparison",
        key_figures=_key_figures(comparison),
        notes=tuple(notes),
        panels=(
            _prefill(comparison),
            *_decode(arms),
            _bars(
                arms,
                f"Divergence from {BASELINE}",
                "KL, nats per token; less is better",
                [(arm, arm.kl_mean, number(arm.kl_mean)) for arm in arms],
            ),
            _bars(
                arms,
                f"Same likeliest token as {BASELINE}",
                "Percent of the answer tokens; more is better",
                [
                    (arm, 100 * arm.top1_agreement, f"{100 * arm.top1_agreement:.1f}")
                    for arm in arms
                ],
            ),
        )
        if arms
        else (),
        tables=_tables(comparison),
    )


def _key_figures(comparison: Comparison) -> tuple[KeyFigure, ...]:
    arms = {arm.name: arm for arm in comparison.arms}
    main, base = arms.get("mixquant"), arms.get(BASELINE)
    if main is None:
        return ()
    quantized = arms.get("quantized")
    figures = []
    if base is not None:
        gains = {
            "prefill": ratio(main.prefill_tokens_per_s, base.prefill_tokens_per_s),
            "time per output token": ratio(base.tpot_s or 0.0, main.tpot_s or 0.0),
        }
        figures += [
            KeyFigure(times(gain), f"mixquant's speed against {BASELINE}: {what}")
            for what, gain in gains.items()
            if gain
        ]
    against = f", {number(quantized.kl_mean)} with both phases quantized" if quantized else ""
    figures.append(
        KeyFigure(number(main.kl_mean), f"mixquant: nats per token from {BASELINE}{against}")
    )
    share = main.quantized_prefill_tokens / main.prefill_tokens if main.prefill_tokens else 0.0
    figures.append(
        KeyFigure(percent(share), f"of the prompt tokens multiplied in {comparison.format}")
    )
    return tuple(figures)


def _prefill(comparison: Comparison) -> Panel:
    arms = comparison.arms
    panel = _bars(
        arms,
        "Time to first token",
        "Seconds, sum over the turns; less is better",
        [(arm, arm.ttft_s, number(arm.ttft_s) + _gain(arm, arms)) for arm in arms],
    )
    turns = range(len(comparison.prompt_tokens_per_turn))
    table = Table(
        f"Time to first token, s, each the median of {comparison.prefill_rounds}",
        (
            "Arm",
            *(f"Turn {t + 1}: {count(comparison.prompt_tokens_per_turn[t])} tokens" for t in turns),
            "Sum",
            "Prefill tokens/s",
            "Times as fast",
        ),
        tuple(
            (
                arm.name,
                *(number(s) for s in arm.ttft_s_per_turn),
                number(arm.ttft_s),
                number(arm.prefill_tokens_per_s),
                _gain(arm, arms).removeprefix(", ") or "–",
            )
            for arm in arms
        ),
    )
    return Panel(panel.title, panel.finding, panel.draw, table)


def _decode(arms: Sequence[ComparedArm]) -> tuple[Panel, ...]:
    ms = [(arm, 1e3 * arm.tpot_s, f"{1e3 * arm.tpot_s:.1f}") for arm in arms if arm.tpot_s]
    return (
        (_bars(arms, "Time per output token", "Milliseconds, median; less is better", ms),)
        if ms
        else ()
    )


def _gain(arm: ComparedArm, arms: Sequence[ComparedArm]) -> str:
    base = next((other for other in arms if other.name == BASELINE), None)
    if base is None or arm is base:
        return ""
    gain = ratio(arm.prefill_tokens_per_s, base.prefill_tokens_per_s)
    return "" if gain is None else f", {times(gain)}"


def _bars(
    arms: Sequence[ComparedArm],
    title: str,
    x_label: str,
    values: Sequence[tuple[ComparedArm, float, str]],
) -> Panel:
    looked = looks(arm.name for arm in arms)
    return Panel(
        title,
        f"{x_label.partition(';')[0]}: {clauses([f'{arm.name} {label}' for arm, _, label in values])}.",
        partial(
            bars,
            rows=[Bar(arm.name, looked[arm.name], value, label) for arm, value, label in values],
            x_label=x_label,
        ),
        Table(title, ("Arm", x_label), tuple((arm.name, label) for arm, _, label in values)),
    )


def _tables(comparison: Comparison) -> tuple[Table, ...]:
    tables = [
        Table(
            "The work",
            ("", ""),
            (
                ("Workload", comparison.workload),
                ("Prompt tokens by turn", _counts(comparison.prompt_tokens_per_turn)),
                ("Answer tokens by turn", _counts(comparison.answer_tokens_per_turn)),
                ("Format and kernel", f"{comparison.format}, {comparison.kernel}"),
                *(
                    (f"First prompt in {name}", f"{number(took)} s")
                    for name, took in comparison.probed_prefill_s.items()
                ),
            ),
            True,
        )
    ]
    if comparison.arms:
        tables += [
            Table(
                "Memory and precision",
                ("Arm", "Precise products in", "Extra MiB", "Quantized prompt tokens"),
                tuple(
                    (
                        arm.name,
                        arm.compute_dtype,
                        f"{arm.extra_bytes / 2**20:.1f}",
                        f"{count(arm.quantized_prefill_tokens)} of {count(arm.prefill_tokens)}",
                    )
                    for arm in comparison.arms
                ),
            ),
            Table(
                "Their own answers to the last question",
                ("Arm", "Answer"),
                tuple((arm.name, arm.text) for arm in comparison.arms),
                True,
            ),
        ]
    return tuple(tables)


def _counts(counts: Sequence[int]) -> str:
    return " + ".join(count(n) for n in counts)
