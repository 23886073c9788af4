"""A comparison as tables for a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from mixquant.cli.hints import why_nothing_quantized
from mixquant.results import ComparedArm, Comparison

_SHORT = {"bfloat16": "bf16", "float32": "fp32"}


def table(result: Comparison) -> Table:
    """The arms, one a line, with what was measured where underneath."""
    turns = " + ".join(str(count) for count in result.prompt_tokens_per_turn)
    kernel = result.kernel if result.native else f"{result.kernel}, so its times say nothing"
    table = Table(
        title=f"{result.model}: prefill in {result.format} ({kernel})",
        title_justify="left",
        caption=f"{result.workload}: {turns} prompt tokens, "
        f"{sum(result.answer_tokens_per_turn)} answer tokens, on {result.device_name}, "
        f"{result.threads} thread{'s' if result.threads != 1 else ''}. TTFT: sum over the turns; a turn "
        "is the median of "
        f"{result.prefill_rounds}. KL (per token) and top-1: from the bf16 arm, "
        "teacher-forced on its answers."
        + _baseline(result)
        + _attention(result)
        + _nothing_quantized(result),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("\narm", no_wrap=True)
    for heading in (
        "\nin",
        "prefill\ntok/s",
        "speed\nup",
        "TTFT\ns",
        "TPOT\nms",
        "KL\nnats",
        "\ntop-1",
        "extra\nMiB",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    baseline = next((arm for arm in result.arms if arm.name == "bf16"), None)
    for arm in result.arms:
        gain = None
        if baseline and _shows_speed(result, arm):
            gain = arm.prefill_tokens_per_s / baseline.prefill_tokens_per_s
        table.add_row(
            arm.name,
            _SHORT.get(arm.compute_dtype, arm.compute_dtype),
            f"{arm.prefill_tokens_per_s:.0f}",
            "-" if gain is None else f"{gain:.2f}x",
            f"{arm.ttft_s:.2f}",
            "-" if arm.tpot_s is None else _tenths(arm.tpot_s * 1e3),
            f"{arm.kl_mean:.4f}",
            f"{arm.top1_agreement:.1%}",
            _tenths(arm.extra_bytes / 2**20),
        )
    return table


def reading(result: Comparison) -> str | None:
    """The table in one sentence, or None if it lacks the arms for that."""
    arms = {arm.name: arm for arm in result.arms}
    bf16, mixquant, quantized = map(arms.get, ("bf16", "mixquant", "quantized"))
    if bf16 is None or mixquant is None or _quantized_nothing(mixquant):
        return None
    divergence = f"diverges from bf16 by {mixquant.kl_mean:.4f} nats a token"
    if quantized is not None:
        divergence += f", where quantizing both phases costs {quantized.kl_mean:.4f}"
    if not _shows_speed(result, mixquant):
        return f"mixquant {divergence}."
    gain = mixquant.prefill_tokens_per_s / bf16.prefill_tokens_per_s
    parts = [f"mixquant reads prompts {gain:.2f} times as fast as bf16"]
    if bf16.tpot_s and mixquant.tpot_s:
        parts.append(
            f"takes {mixquant.tpot_s / bf16.tpot_s:.2f} times as long for a token of an answer"
        )
    return f"{', '.join(parts)} and {divergence}."


def answers(result: Comparison) -> Table:
    """What each arm itself answers to the last question."""
    table = Table(
        title="Each arm's own answer to the last question",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("arm", no_wrap=True)
    table.add_column("answer")
    for arm in result.arms:
        table.add_row(arm.name, arm.text)
    return table


def _tenths(value: float) -> str:
    """Tenths only below 1,000, so that a terminal of 80 columns cuts no digit off."""
    return f"{value:.1f}" if value < 999.95 else f"{value:.0f}"


def _baseline(result: Comparison) -> str:
    if len(result.probed_prefill_s) < 2:
        return ""
    probes = ", ".join(f"{name} {took:.2f} s" for name, took in result.probed_prefill_s.items())
    fastest = min(result.probed_prefill_s, key=result.probed_prefill_s.__getitem__)
    return f" The bf16 arm computes in {fastest}, the faster here (start of the first prompt: {probes})."


def _attention(result: Comparison) -> str:
    said = f" {result.attention[0].upper()}{result.attention[1:]}." if result.attention else ""
    if any(arm.name == "attention" for arm in result.arms):
        said += (
            " The arm attention quantizes nothing: BF16 products, and BF16 attention in our kernel."
        )
    return said


def _shows_speed(result: Comparison, arm: ComparedArm) -> bool:
    """Whether an arm's times are those of its products, and not of their emulation, or of BF16's."""
    if arm.name in ("bf16", "attention"):
        return True
    return result.native and not _quantized_nothing(arm)


def _quantized_nothing(arm: ComparedArm) -> bool:
    return arm.name not in ("bf16", "attention") and arm.quantized_prefill_tokens == 0


def _nothing_quantized(result: Comparison) -> str:
    """A sentence on the arms that did only what bf16 does, so that their times are no speed-up."""
    names = [arm.name for arm in result.arms if _quantized_nothing(arm)]
    if not names:
        return ""
    why = why_nothing_quantized(result.recipe, max(result.prompt_tokens_per_turn))
    return f" {' and '.join(names)} quantized no prompt token ({why}): no speed-up is shown."
