"""What fidelity figures mean, in words: which arm is nearest to BF16, and how distances change."""

from __future__ import annotations

from mixquant.report.names import device_in_words, model_name
from mixquant.report.text import count, listed, number, percent
from mixquant.results import BASELINE, Fidelity


def verdict(fidelity: Fidelity) -> str:
    """Which arm is nearest to BF16 at the longest prompt, and how far the others are."""
    longest = max((d.prompt_tokens for d in fidelity.results), default=0)
    compared = sorted(
        (d for d in fidelity.results if d.prompt_tokens == longest and d.arm != BASELINE),
        key=lambda d: d.kl_mean,
    )
    if not compared:
        return ""
    nearest, furthest = compared[0], compared[-1]
    said = (
        f"Answers of {model_name(fidelity.model)} with {nearest.arm} are "
        f"{number(nearest.kl_mean)} nats per token from BF16's after {count(longest)} prompt tokens "
        f"on {device_in_words(fidelity.environment)}, and the likeliest token is the same at "
        f"{percent(nearest.top1)} of the positions."
    )
    if len(compared) > 1 and furthest.kl_mean > nearest.kl_mean:
        said += (
            f" Of {len(compared)} arms this is the nearest; the furthest is {furthest.arm} "
            f"({number(furthest.kl_mean)})."
        )
    return said


def notes(fidelity: Fidelity) -> tuple[str, ...]:
    """A warning for each arm that quantized nothing: its distance says nothing of its recipe."""
    # Arms with arguments run without mixquant, unless a recipe is known.
    others = {arm.name for arm in fidelity.arms if arm.arguments is not None and not arm.recipe}
    idle: dict[str, list[str]] = {}
    for d in fidelity.results:
        if d.arm not in (BASELINE, *others) and d.quantized_share == 0:
            idle.setdefault(d.arm, []).append(count(d.prompt_tokens))
    return tuple(
        f"{arm} quantized no prompt token at prompts of {listed(lengths)} tokens, so its distance "
        "there says nothing about the recipe."
        for arm, lengths in idle.items()
    )


def trends(opening: str, span: str, ends: dict[str, tuple[float, float]]) -> str:
    """Whose line rises, falls or stays; a third more or less is a trend."""
    words = ("falls for", "rises for", "stays about level for")
    groups: dict[str, list[str]] = {word: [] for word in words}
    for arm, (first, last) in ends.items():
        word = words[0] if last < 0.75 * first else words[1] if last > first / 0.75 else words[2]
        groups[word].append(arm)
    said = [f"{word} {listed(arms)}" for word, arms in groups.items() if arms]
    return f"{opening} From {span}, the distance {'; it '.join(said)}."
