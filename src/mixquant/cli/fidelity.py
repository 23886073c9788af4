"""`mixquant fidelity`."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixquant.checkpoints.models import find, load_tokenizer
from mixquant.cli.console import (
    InputError,
    check_writable,
    out,
    read_text,
    say,
    write_results,
    write_so_far,
)
from mixquant.cli.options import (
    FormatOption,
    JsonFile,
    Model,
    check_prefill_model,
    chosen_recipe,
    lengths,
    saved_recipe,
)
from mixquant.cli.progress import progress_bar
from mixquant.core.recipe import PRESETS, Recipe

if TYPE_CHECKING:
    from mixquant.checkpoints.models import Checkpoint
    from mixquant.evaluate.fidelity.answers import Engine
    from mixquant.results import Fidelity

DEFAULT_FIDELITY_TEXTS = 4


class EngineName(StrEnum):
    transformers = "transformers"
    vllm = "vllm"


def fidelity(
    context: typer.Context,
    model: Model,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="UTF-8 text whose beginning is the prompt. May be repeated.",
            show_default="Python's documentation",
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            metavar="RECIPE",
            help="Preset (fast, balanced, exact), JSON object or JSON file. May be repeated; each "
            "recipe is an arm.",
            show_default="balanced; none with --arm",
        ),
    ] = None,
    format: FormatOption = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            metavar="NAME=ARGUMENTS",
            help="Add an arm: vLLM without mixquant, with these arguments, such as another --model or "
            "--quantization. May be repeated. Needs --engine vllm.",
        ),
    ] = None,
    length: Annotated[
        list[str] | None,
        typer.Option(
            "--length",
            metavar="N[,N...]",
            help="Prompt lengths, in tokens. May be repeated.",
            show_default="1024",
        ),
    ] = None,
    answer_tokens: Annotated[
        int,
        typer.Option(
            "--answer-tokens", min=1, metavar="N", help="Tokens to compare after each prompt."
        ),
    ] = 96,
    texts: Annotated[
        int | None,
        typer.Option(
            "--texts",
            min=1,
            metavar="N",
            help="Number of built-in texts to read.",
            show_default=str(DEFAULT_FIDELITY_TEXTS),
        ),
    ] = None,
    quantized: Annotated[
        bool,
        typer.Option(
            help="Add an arm that quantizes both phases with the first recipe.",
        ),
    ] = True,
    engine: Annotated[
        EngineName,
        typer.Option(
            "--engine", help="Engine that runs the model; vllm for models that only fit there."
        ),
    ] = EngineName.transformers,
    vllm_args: Annotated[
        str,
        typer.Option("--vllm-args", metavar="ARGUMENTS", help="vLLM arguments, as one string."),
    ] = "",
    json_file: JsonFile = None,
) -> None:
    """Measure how far each recipe's token distributions are from BF16's, and what it quantizes.

    Task scores of a few samples are mostly noise. The divergence of every token's distribution shows
    small differences.
    """
    prompts = lengths(length) or [1024]
    sources: list[str | None] = [*recipe] if recipe else []
    if not sources and (format is not None or not arm):
        sources = [None]
    chosen = [chosen_recipe(source, format) for source in sources]
    names = _names(sources)
    runner = _engine(engine, vllm_args)
    others = _others(engine, arm or (), vllm_args, {*names, "bf16", "quantized"})
    if text and texts is not None:
        raise InputError("--texts counts the built-in texts; leave it out with --text")
    given = {str(file): read_text(file) for file in text or ()}
    if json_file is not None:
        check_writable(json_file)
    checkpoint = find(model, say)

    from transformers.utils import logging

    from mixquant.cli.tables.fidelity import tables
    from mixquant.evaluate.fidelity.passages import check_lengths, cut, documentation
    from mixquant.evaluate.fidelity.run import measure
    from mixquant.results import to_json

    logging.disable_progress_bar()  # ours tells the same

    check_lengths(checkpoint, prompts, answer_tokens)
    given = given or documentation(texts or DEFAULT_FIDELITY_TEXTS)
    passages = cut(given, load_tokenizer(checkpoint), prompts, answer_tokens)
    recipes = {
        name: one or saved_recipe(checkpoint) for name, one in zip(names, chosen, strict=True)
    }
    if quantized and recipes:
        recipes["quantized"] = replace(next(iter(recipes.values())), everywhere=True)
    _check_recipes(engine, recipes, checkpoint)

    finished: list[Fidelity] = []

    def keep(so_far: Fidelity) -> None:
        finished.append(so_far)
        if json_file is not None:
            write_so_far(json_file, to_json(so_far))

    try:
        with progress_bar() as progress:
            measure(
                runner,
                checkpoint,
                recipes,
                passages,
                others=others,
                description={
                    "command": context.obj,
                    "engine": engine.value,
                    "texts": tuple(given),
                },
                progress=progress,
                done=keep,
            )
    finally:  # results of earlier arms are shown even if an arm fails
        if finished:
            with ExitStack() as then:
                if json_file is not None:
                    then.callback(say, f"Results written to {json_file.absolute()}")
                    then.callback(write_results, json_file, to_json(finished[-1]))
                out.print(*tables(finished[-1]), sep="")


def _names(sources: Sequence[str | None]) -> list[str]:
    """The names of the arms: the preset or the file's name; ``mixquant`` without a recipe."""
    names: list[str] = []
    for source in sources:
        if source is None:
            name = "mixquant"
        elif source in PRESETS:
            name = source
        else:
            name = "recipe" if source.lstrip().startswith("{") else Path(source).stem
        taken = {*names, "bf16", "quantized"}
        number = 2
        unique = name
        while unique in taken:
            unique, number = f"{name}-{number}", number + 1
        names.append(unique)
    return names


def _engine(engine: EngineName, vllm_args: str) -> Engine:
    if engine is EngineName.transformers:
        if vllm_args:
            raise InputError("--vllm-args needs --engine vllm")
        from mixquant.evaluate.fidelity.answers_transformers import run

        return run
    if importlib.util.find_spec("vllm") is None:
        raise InputError("vLLM is not installed: pip install 'mixquant[vllm]', or '[cpu]' on a CPU")
    from mixquant.evaluate.fidelity.answers_vllm import DECIDED, VLLM

    return VLLM(_arguments("--vllm-args", vllm_args, DECIDED))


def _others(
    engine: EngineName, arms: Sequence[str], vllm_args: str, taken: set[str]
) -> dict[str, tuple[Engine, str]]:
    """The arms that the user makes of vLLM's arguments, and these arguments."""
    if not arms:
        return {}
    if engine is not EngineName.vllm:
        raise InputError("--arm needs --engine vllm")
    from mixquant.evaluate.fidelity.answers_vllm import DECIDED, OF_ARMS, VLLM
    from mixquant.servers.arms import ARM_NAME

    shared = _arguments("--vllm-args", vllm_args, DECIDED)
    decided = [option for option in DECIDED if option not in OF_ARMS]
    found: dict[str, tuple[Engine, str]] = {}
    for text in arms:
        name, given, own = text.partition("=")
        if not given or not ARM_NAME.fullmatch(name):
            raise InputError(f"--arm {text!r}: expected NAME=ARGUMENTS with arguments for vLLM")
        if name in taken or name in found:
            raise InputError(f"two arms are called {name!r}")
        arguments = (*shared, *_arguments(f"--arm {name}", own, decided))
        found[name] = VLLM(arguments), shlex.join(arguments)
    return found


def _arguments(option: str, text: str, decided: Sequence[str]) -> tuple[str, ...]:
    from mixquant.servers.process import stands_for

    try:
        arguments = tuple(shlex.split(text))
    except ValueError as error:
        raise InputError(f"{option}: cannot read {text!r}: {error}") from None
    for argument in arguments:
        if (found := stands_for(argument, decided)) is not None:
            raise InputError(f"{option}: {argument!r} is {found}, which this command sets")
    return arguments


def _check_recipes(engine: EngineName, recipes: dict[str, Recipe], checkpoint: Checkpoint) -> None:
    """Refuses recipes that an arm would refuse later, before anything is loaded."""
    if engine is EngineName.transformers:
        for one in recipes.values():
            one.resolved(frozenset())
            check_prefill_model(one, checkpoint)
        return
    from mixquant.engines.vllm.settings import resolve

    for one in recipes.values():
        resolve(one.to_dict())
