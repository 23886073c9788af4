"""The results of `mixquant compare` as plots."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mixquant.report.derived import ATTENTION_ARM, ratio, sign_of
from mixquant.report.names import device_in_words, model_name
from mixquant.report.parts import KeyFigure, Panel, Section, Table
from mixquant.report.plots import Bar, bars
from mixquant.report.style import looks
from mixquant.report.text import clauses, count, number, percent, times
from mixquant.report.verdicts import in_words
from mixquant.results import BASELINE, ComparedArm, Comparison


def section(comparison: Comparison) -> Section:
    """Speed and fidelity of each arm, side by side, and what it answered."""
    arms = comparison.arms
    notes = []
    if not comparison.native:
        notes.append(
            f"{comparison.format.upper()} is emulated here, not native: its times say nothing."
        )
    notes += [
        f"{arm.name} quantized no prompt token, so its times are no speed-up. A pass is quantized "
        f"from {count(threshold)} tokens on."
        if isinstance(threshold := comparison.recipe.get("min_prefill_tokens"), int)
        else f"{arm.name} quantized no prompt token, so its times are no speed-up."
        for arm in arms
        if arm.name not in (BASELINE, ATTENTION_ARM) and arm.quantized_prefill_tokens == 0
    ]
    if any(arm.name == ATTENTION_ARM for arm in arms):
        notes.append(
            "The arm attention quantizes nothing: attention of the prompt is in mixquant's kernel, in "
            "BF16."
        )
    return Section(
        title={3: "Comparison in three arms", 4: "Comparison in four arms"}.get(
            len(arms), "Comparison"
        ),
        verdict=_verdict(comparison),
        key_figures=_key_figures(comparison),
        notes=tuple(notes),
        panels=(
            _prefill(comparison),
            *_decode(arms),
            _bars(
                arms,
                "Distance from BF16",
                _nearness(arms),
                "KL, nats per token; less is better",
                [(arm, arm.kl_mean, number(arm.kl_mean)) for arm in arms],
            ),
            _bars(
                arms,
                "Same likeliest token as BF16",
                "How often an arm would choose the token that BF16 chooses. A longer bar is better.",
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


def _verdict(comparison: Comparison) -> str:
    """Speed of prefill and decode with where they hold, and the distance from BF16."""
    arms = {arm.name: arm for arm in comparison.arms}
    main, base = arms.get("mixquant"), arms.get(BASELINE)
    if main is None:
        return ""
    model, where = model_name(comparison.model), device_in_words(comparison.environment)
    said = []
    prefill = _prefill_ratio(comparison, main)
    turns = len(comparison.prompt_tokens_per_turn)
    tokens = f"{count(main.prefill_tokens)} prompt tokens"
    if turns > 1:
        tokens += f" in {turns} turns"
    if prefill is not None:
        said.append(
            in_words(f"Prefill of {model} with mixquant", [prefill], f"at {tokens} on {where}")
        )
        decode = ratio(base.tpot_s or 0.0, main.tpot_s or 0.0) if base else None
        if decode is not None:
            said.append(in_words("Decode", [decode]))
    elif main.quantized_prefill_tokens == 0:
        said.append(f"mixquant quantized nothing at {tokens} of {model} on {where}")
    elif not comparison.native:
        said.append(
            f"{comparison.format.upper()} is emulated on {where}, so this file shows no speed, only the "
            f"distance from BF16 ({model}, {tokens})"
        )
    quantized = arms.get("quantized")
    if main.quantized_prefill_tokens and quantized and quantized.kl_mean != main.kl_mean:
        nearer = main.kl_mean < quantized.kl_mean
        said.append(
            f"mixquant's answers are {'nearer to' if nearer else 'further from'} BF16's than with both "
            f"phases quantized (KL {number(main.kl_mean)} against {number(quantized.kl_mean)} nats "
            "per token)"
        )
    return "".join(f"{sentence}. " for sentence in said).rstrip()


def _key_figures(comparison: Comparison) -> tuple[KeyFigure, ...]:
    arms = {arm.name: arm for arm in comparison.arms}
    main, base = arms.get("mixquant"), arms.get(BASELINE)
    if main is None:
        return ()
    quantized = arms.get("quantized")
    figures = []
    if base is not None and (prefill := _prefill_ratio(comparison, main)) is not None:
        gains = {
            "prefill": prefill,
            "time per output token": ratio(base.tpot_s or 0.0, main.tpot_s or 0.0),
        }
        figures += [
            KeyFigure(times(gain), f"mixquant's speed against BF16: {what}", sign_of(gain) < 0)
            for what, gain in gains.items()
            if gain
        ]
    against = f", {number(quantized.kl_mean)} with both phases quantized" if quantized else ""
    figures.append(KeyFigure(number(main.kl_mean), f"mixquant: nats per token from BF16{against}"))
    share = main.quantized_prefill_tokens / main.prefill_tokens if main.prefill_tokens else 0.0
    figures.append(
        KeyFigure(percent(share), f"of the prompt tokens multiplied in {comparison.format.upper()}")
    )
    return tuple(figures)


def _prefill(comparison: Comparison) -> Panel:
    arms = comparison.arms
    panel = _bars(
        arms,
        "Time to first token",
        _speed_meaning(comparison),
        "Seconds, sum over the turns; less is better",
        [(arm, arm.ttft_s, number(arm.ttft_s) + _gain(comparison, arm)) for arm in arms],
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
                _gain(comparison, arm).removeprefix(", ") or "–",
            )
            for arm in arms
        ),
    )
    return Panel(panel.title, panel.meaning, panel.numbers, panel.draw, table)


def _decode(arms: Sequence[ComparedArm]) -> tuple[Panel, ...]:
    ms = [(arm, 1e3 * arm.tpot_s, f"{1e3 * arm.tpot_s:.1f}") for arm in arms if arm.tpot_s]
    if not ms:
        return ()
    meaning = "How long each token after the first takes."
    if any(arm.name == "mixquant" for arm, *_ in ms):
        meaning += " mixquant decodes in BF16, so its bar should be as long as BF16's."
    return (
        _bars(arms, "Time per output token", meaning, "Milliseconds, median; less is better", ms),
    )


def _prefill_ratio(comparison: Comparison, arm: ComparedArm) -> float | None:
    """None where a ratio would mislead: the format is emulated, or the arm quantized nothing."""
    base = next((other for other in comparison.arms if other.name == BASELINE), None)
    if base is None or arm is base:
        return None
    if arm.name != ATTENTION_ARM and not (comparison.native and arm.quantized_prefill_tokens):
        return None
    return ratio(arm.prefill_tokens_per_s, base.prefill_tokens_per_s)


def _gain(comparison: Comparison, arm: ComparedArm) -> str:
    gain = _prefill_ratio(comparison, arm)
    return "" if gain is None else f", {times(gain)}"


def _speed_meaning(comparison: Comparison) -> str:
    words = {1: "sooner than BF16", -1: "later than BF16", 0: "about when BF16 does"}
    said = [
        f"{arm.name} answers {words[sign_of(gain)]}"
        for arm in comparison.arms
        if (gain := _prefill_ratio(comparison, arm)) is not None
    ]
    opening = "How long the reader of an answer waits for its first token."
    return f"{opening} {clauses(said)}." if said else opening


def _nearness(arms: Sequence[ComparedArm]) -> str:
    """What KL means, and which of the arms is nearest."""
    others = sorted((arm for arm in arms if arm.name != BASELINE), key=lambda arm: arm.kl_mean)
    said = "How far an arm's next-token probabilities are from BF16's; 0 is no difference."
    if len(others) > 1 and others[0].kl_mean < others[-1].kl_mean:
        said += f" {others[0].name} stays nearest to BF16, {others[-1].name} is furthest."
    return said


def _bars(
    arms: Sequence[ComparedArm],
    title: str,
    meaning: str,
    x_label: str,
    values: Sequence[tuple[ComparedArm, float, str]],
) -> Panel:
    looked = looks(arm.name for arm in arms)
    return Panel(
        title,
        meaning,
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
                *((("Attention", comparison.attention),) if comparison.attention else ()),
                *(
                    (f"Start of the first prompt in {name}", f"{number(took)} s")
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
