"""What benchmark scores mean, in words: the means, and which differences are more than chance."""

from __future__ import annotations

from statistics import fmean

from mixquant.report.names import device_in_words, model_name
from mixquant.report.text import listed, percent
from mixquant.results import BASELINE, Evaluation


def mean_scores(evaluation: Evaluation) -> tuple[dict[str, float], int]:
    """Each arm's mean over the benchmarks that all arms have, and how many these are."""
    scored: dict[str, dict[str, float]] = {}
    for s in evaluation.scores:
        scored.setdefault(s.arm, {})[s.benchmark] = s.score
    common = set.intersection(*(set(of_arm) for of_arm in scored.values())) if scored else set()
    if not common:
        return {}, 0
    return {
        arm: fmean(of_arm[name] for name in sorted(common)) for arm, of_arm in scored.items()
    }, len(common)


def verdict(evaluation: Evaluation, arms: tuple[str, ...]) -> str:
    """The mean scores with where they hold, and which differences to BF16 are more than chance."""
    means, benchmarks = mean_scores(evaluation)
    shown = [f"{arm} {percent(means[arm])}" for arm in arms if arm in means]
    if not shown:
        return ""
    score = f"Mean score over {benchmarks} benchmarks" if benchmarks > 1 else "Score"
    said = (
        f"{score} of {model_name(evaluation.model)} on {device_in_words(evaluation.environment)}: "
        f"{listed(shown)}."
    )
    main = "mixquant" if "mixquant" in arms else next((arm for arm in arms if arm != BASELINE), "")
    own = [d for d in evaluation.differences if (d.arm, d.versus) == (main, BASELINE)]
    worse = [d.benchmark for d in own if d.high < 0]
    better = [d.benchmark for d in own if d.low > 0]
    if not own:
        return said
    if worse:
        said += f" {main} is worse than BF16 beyond chance in {listed(worse)}."
    if better:
        said += f" {main} is better than BF16 beyond chance in {listed(better)}."
    if not worse and not better:
        said += f" No difference between {main} and BF16 is beyond chance (95 % intervals)."
    return said
