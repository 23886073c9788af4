"""Arguments and options that several commands have."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from mixquant.checkpoints.models import Checkpoint
from mixquant.checkpoints.smollm2 import SMOLLM2
from mixquant.core.recipe import Recipe

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help=f"Model directory, Hugging Face Hub name, or [bold]{SMOLLM2}[/bold]."
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help="Preset (fast, balanced, exact), JSON object or JSON file.",
        show_default="balanced",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="Format of prefill: auto (the fastest that the device multiplies natively), nvfp4, fp8, "
        "int8 or bf16. Overrides the recipe's.",
        show_default="auto",
    ),
]
LARGEST_SEED = 2**32 - 1  # NumPy's
MAX_COUNT = 2**31 - 1  # engines count in 32 bits
NewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens",
        min=1,
        max=MAX_COUNT,
        metavar="N",
        help="Maximum length of an answer, in tokens.",
    ),
]


def lengths(given: list[str] | None) -> list[int]:
    """The numbers of options that each hold one or several, separated by commas.

    Raises:
        typer.BadParameter: one is not a whole number from 1 to `MAX_COUNT`.
    """
    found: list[int] = []
    for text in ",".join(given or ()).split(",") if given else ():
        if not text.strip().isdecimal() or not 1 <= int(text) <= MAX_COUNT:
            raise typer.BadParameter(
                f"expected a whole number from 1 to {MAX_COUNT}, got {text.strip()!r}",
                param_hint="'--length'",
            )
        found.append(int(text))
    return list(dict.fromkeys(found))


def finite(value: float | None) -> float | None:
    """For options with bounds: NaN passes typer's check of bounds."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}")
    return value


def temperature_option(value: float | None) -> float | None:
    """Takes 0, or a value that logits can be divided by: at least 0.01, as in vLLM."""
    if value and not 0.01 <= value <= 100:  # not NaN, either
        raise typer.BadParameter(f"expected 0, or a number from 0.01 to 100, got {value}")
    return value


Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        min=0.0,
        callback=temperature_option,
        help="Sampling temperature; 0 takes the likeliest token.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Sampling seed.")]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the results to this file, as JSON."),
]
ServedName = Annotated[
    str | None,
    typer.Option(
        "--served-name",
        metavar="NAME",
        help="Name of the model at the servers.",
        show_default="MODEL",
    ),
]
ServerArguments = Annotated[
    str,
    typer.Option(
        "--vllm-args",
        metavar="ARGUMENTS",
        help="vLLM arguments for every server that is started.",
    ),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompt-file", metavar="FILE", help="Read the prompt from this file, as UTF-8 text."
    ),
]


def check_prefill_model(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Checks a recipe's second checkpoint, if it has one, before a model is loaded.

    Raises:
        CheckpointError, RecipeError: it cannot be read, is of another model, or has other formats.
    """
    if recipe.prefill_model is not None:
        from mixquant.checkpoints.second_checkpoint import check_fits, with_format_of

        with_format_of(recipe)
        check_fits(recipe.prefill_model, checkpoint.config, checkpoint.source)


def chosen_recipe(recipe: str | None, format: str | None) -> Recipe | None:
    """The recipe that the options give; None if no option gives one."""
    if recipe is None and format is None:
        return None
    chosen = Recipe.load("balanced" if recipe is None else recipe)
    return chosen if format is None else Recipe.from_dict({**chosen.to_dict(), "format": format})


def saved_recipe(checkpoint: Checkpoint) -> Recipe:
    return Recipe.from_dict(checkpoint.recipe or {})


def wait_briefly() -> None:
    """Makes the threads of GNU OpenMP, in PyTorch, sleep after waiting some 0.1 ms for each other.

    By default they spin for milliseconds. Where anything else runs on the machine, that keeps a core
    from the thread that is waited for. The variable is read when PyTorch is loaded, which comes later.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
