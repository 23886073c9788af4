"""The names of models, devices and arms on the page, and a description of each arm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mixquant.report.derived import ATTENTION_ARM
from mixquant.report.text import listed
from mixquant.results import BASELINE, Arm, Comparison, Environment, Results

# What `mixquant fidelity` calls recipes that are given as JSON.
_NUMBERED = re.compile(r"recipe(-\d+)?")
_ONLY_ATTENTION = "nothing quantized; the prompt attends in mixquant's kernel, in BF16"
_MAX_NAMED = 3  # patterns of a recipe's formats in a description
_SHORT = {
    "preset": "",
    "format.default": "",
    "prefill_attention": "attention",
    "precise_tail": "tail",
    "precise_head": "head",
    "min_prefill_tokens": "threshold",
}


def model_name(model: str) -> str:
    """A model's name without the folders before it."""
    return model.rstrip("/").rpartition("/")[2] or model


def device_in_words(environment: Environment) -> str:
    """The device in a sentence: a GPU as its vendor calls it, a CPU with its threads."""
    if not environment.device.startswith("CPU"):
        return environment.device
    facts = [environment.device.removeprefix("CPU").lstrip(", ")]
    if environment.threads is not None:
        facts.append(f"{environment.threads} thread{'s' if environment.threads != 1 else ''}")
    said = ", ".join(fact for fact in facts if fact)
    return f"a CPU ({said})" if said else "a CPU"


def with_labels(results: Results) -> tuple[Results, dict[str, str]]:
    """The results with numbered recipes named by what differs between them, and the new names."""
    labels = {} if isinstance(results, Comparison) else labels_of(results.arms)
    if not labels:
        return results, {}
    values = _renamed(results.model_dump(), labels)
    for arm in values["arms"]:
        arm["name"] = labels.get(arm["name"], arm["name"])
    return type(results).model_validate(values), labels


def labels_of(arms: Sequence[Arm]) -> dict[str, str]:
    """Labels for the arms named recipe, recipe-2 and so on: the settings in which they differ."""
    recipes = {
        arm.name: _flat(arm.recipe) for arm in arms if arm.recipe and _NUMBERED.fullmatch(arm.name)
    }
    if not recipes:
        return {}
    keys = dict.fromkeys(("preset", "format.default"))
    keys |= dict.fromkeys(key for recipe in recipes.values() for key in recipe)
    chosen: list[str] = []
    distinct = 1
    for key in keys:
        found = {tuple(str(r.get(k)) for k in (*chosen, key)) for r in recipes.values()}
        if len(found) > distinct:
            chosen.append(key)
            distinct = len(found)
    labels = {
        name: " + ".join(_setting(key, recipe.get(key)) for key in chosen or ["preset"])
        for name, recipe in recipes.items()
    }
    others = {arm.name for arm in arms if arm.name not in recipes}
    taken = [*labels.values(), *others]
    return {name: label for name, label in labels.items() if taken.count(label) == 1}


def _renamed(value: Any, labels: Mapping[str, str]) -> Any:
    """The same with new names wherever a field refers to an arm."""
    if isinstance(value, dict):
        return {
            key: labels.get(inner, inner)
            if key in ("arm", "versus") and isinstance(inner, str)
            else _renamed(inner, labels)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_renamed(inner, labels) for inner in value]
    return value


def _flat(recipe: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat


def _setting(key: str, value: Any) -> str:
    name = _SHORT.get(key, key.removeprefix("format."))
    if value is None or value is False:
        return f"no {name or key}"
    if value is True:
        return name
    if isinstance(value, list):
        value = "+".join(str(part) for part in value)
    return f"{name} {value}".strip()


def described(results: Results) -> list[tuple[str, str]]:
    """Each arm with what it is, in a few words."""
    if isinstance(results, Comparison):
        recipe = results.recipe | {"format": results.format}
        return [
            (arm.name, _ONLY_ATTENTION)
            if arm.name == ATTENTION_ARM
            else (arm.name, _described(Arm(name=arm.name), recipe))
            for arm in results.arms
        ]
    arms = sorted(results.arms, key=lambda arm: arm.name != BASELINE)
    recipes = [arm.recipe for arm in arms if arm.recipe is not None]
    attention = {recipe.get("prefill_attention", "auto") for recipe in recipes}
    differs = len(attention) > 1 or len(recipes) == 1
    return [(arm.name, words) for arm in arms if (words := _described(arm, arm.recipe, differs))]


def _described(arm: Arm, recipe: Mapping[str, Any] | None, attention_differs: bool = True) -> str:
    if arm.name == BASELINE:
        return "the model as it is, nothing quantized"
    if recipe is None:
        if arm.name == "mixquant":
            return "prefill quantized, decode in BF16"
        if arm.arguments:
            return f"a server with {arm.arguments}"
        return f"the server at {arm.url}" if arm.url else ""
    formats = recipe.get("format")
    own = formats if isinstance(formats, dict) else {"default": formats}
    if set(own.values()) == {"bf16"}:
        said = "no linear layer quantized"
    elif arm.name == "quantized" or recipe.get("everywhere"):
        said = f"prefill and decode {_in_formats(own)}"
    else:
        said = f"prefill {_in_formats(own)}, decode in BF16"
    if model := recipe.get("prefill_model"):
        said += f"; the copy's weights are of {model_name(model)}"
    if (tail := recipe.get("precise_tail", 1)) > 1:
        said += f"; the last {tail} tokens are precise"
    attention = recipe.get("prefill_attention", "auto")
    return (
        said
        if attention == "auto" or not attention_differs
        else f"{said}; prefill attends {_in_format(attention)}"
    )


def _in_formats(formats: Mapping[str, Any]) -> str:
    """The default format, and what has another: by name, or, if that is much, by count."""
    rest = {name: to for name, to in formats.items() if name != "default"}
    said = _in_format(formats.get("default"))
    if not rest:
        return said
    if len(rest) <= _MAX_NAMED:
        return f"{said} ({listed([f'{name} {_in_format(to)}' for name, to in rest.items()])})"
    (most, n), *others = Counter(rest.values()).most_common()
    counts = [f"{n} patterns {_in_format(most)}", *(f"{n} {_in_format(to)}" for to, n in others)]
    return f"{said} ({listed(counts)}: see the recipe below)"


def _in_format(name: Any) -> str:
    return f"in {str(name).upper()}" if name else "quantized"
