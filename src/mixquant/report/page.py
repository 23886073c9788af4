"""Results files as one page of HTML that needs nothing else: no network, script or other file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mixquant.report import bench, comparison, evaluation, fidelity, tuning
from mixquant.report.names import described, model_name, with_labels
from mixquant.report.parts import Panel, Section
from mixquant.report.plots import Alt
from mixquant.report.text import listed, plain
from mixquant.results import Bench, Comparison, Evaluation, Fidelity, Results, Tuning


def page(files: Sequence[tuple[str | None, Results]]) -> str:
    """The page.

    Args:
        files: what was read, in the order that the page has it, each with its file's name; None if
            it was not read from a file.

    Returns:
        A whole document. The same files give the same text.

    Raises:
        ValueError: there are no files.
    """
    if not files:
        raise ValueError("a page needs at least one results file")
    environment = Environment(
        loader=PackageLoader("mixquant.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    models = dict.fromkeys(model_name(results.model) for _, results in files)
    html = environment.get_template("page.html").render(
        title=f"mixquant on {listed(list(models))}",
        several_models=len(models) > 1,
        files=[_file(f"file-{n}", name, results) for n, (name, results) in enumerate(files, 1)],
    )
    # JSON can hold halves of surrogate pairs, UTF-8 cannot.
    return html.encode("utf-8", "replace").decode("utf-8")


def _file(identity: str, name: str | None, results: Results) -> dict[str, Any]:
    results, labels = with_labels(results)
    section = _section(results)
    return {
        "identity": identity,
        "name": name,
        "model": model_name(results.model),
        "device": results.environment.device,
        "section": section,
        "verdict": _prose(section.verdict),
        "compared": described(results),
        "panels": [_panel(f"{identity}-{n}", p) for n, p in enumerate(section.panels, 1)],
        "facts": _facts(results),
        "command": results.command,
        "arms": _arms(results, {label: arm for arm, label in labels.items()}),
    }


def _section(results: Results) -> Section:
    match results:
        case Bench():
            return bench.section(results)
        case Fidelity():
            return fidelity.section(results)
        case Evaluation():
            return evaluation.section(results)
        case Comparison():
            return comparison.section(results)
        case Tuning():
            return tuning.section(results)


def _panel(identity: str, panel: Panel) -> dict[str, Any]:
    description = plain(f"{panel.meaning} {panel.numbers}")
    return {
        "identity": identity,
        "title": panel.title,
        "meaning": _prose(panel.meaning),
        "plot": panel.draw(Alt(identity, plain(panel.title), description)),
        "table": panel.table,
    }


def _prose(text: str) -> str:
    """With no line break between a number and its percent sign."""
    return plain(text).replace(" %", "\N{NO-BREAK SPACE}%")


def _facts(results: Results) -> list[tuple[str, str]]:
    where = results.environment
    facts = [("Model", results.model), ("Device", where.device), ("Date", where.date)]
    if where.threads is not None:
        facts.append(("Threads", str(where.threads)))
    if where.platform is not None:
        facts.append(("Platform", where.platform))
    if isinstance(results, Fidelity):
        facts.append(("Engine", results.engine))
    return facts + [(name, version) for name, version in where.versions.items()]


def _arms(results: Results, in_file: dict[str, str]) -> list[dict[str, str | None]]:
    if isinstance(results, Comparison):
        recipe = _pretty(results.recipe)
        return [
            {"name": "mixquant", "in_file": None, "arguments": None, "url": None, "recipe": recipe}
        ]
    return [
        {
            "name": arm.name,
            "in_file": in_file.get(arm.name),
            "arguments": arm.arguments,
            "url": arm.url,
            "recipe": None if arm.recipe is None else _pretty(arm.recipe),
        }
        for arm in results.arms
        if arm.arguments or arm.url or arm.recipe is not None
    ]


def _pretty(recipe: dict[str, Any]) -> str:
    return json.dumps(recipe, indent=2, ensure_ascii=False)
