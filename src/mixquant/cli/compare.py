"""`mixquant compare`."""

from __future__ import annotations

from contextlib import ExitStack
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
    write_whole,
)
from mixquant.cli.options import (
    FormatOption,
    Model,
    NewTokens,
    RecipeOption,
    check_prefill_model,
    chosen_recipe,
    saved_recipe,
    wait_briefly,
)
from mixquant.cli.progress import progress_bar

if TYPE_CHECKING:
    from mixquant.results import Comparison


def compare(
    context: typer.Context,
    model: Model,
    recipe: RecipeOption = None,
    format: FormatOption = None,
    arms: Annotated[
        str,
        typer.Option(
            "--arms",
            metavar="NAMES",
            help="Arms to report, separated by commas. attention (BF16 products, our attention) runs "
            "only on CPUs where that is faster.",
        ),
    ] = "bf16,attention,quantized,mixquant",
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-file",
            metavar="FILE",
            help="Document that the conversation is about, as UTF-8 text.",
            show_default="Python's documentation",
        ),
    ] = None,
    max_new_tokens: NewTokens = 24,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Also write the results to this file, as JSON."
        ),
    ] = None,
    report_file: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Also write a report to this file, as HTML."),
    ] = None,
) -> None:
    """Run an agent-like conversation in BF16, fully quantized and with mixquant, and compare them."""
    chosen = chosen_recipe(recipe, format)
    names = _arms(arms)
    text = None if prompt_file is None else read_text(prompt_file)
    if text is not None and not text.strip():
        raise InputError(f"{prompt_file} is empty")
    for file in (json_file, report_file):
        if file is not None:
            check_writable(file)
    wait_briefly()
    checkpoint = find(model, say)

    from transformers.utils import logging

    from mixquant.cli.tables.compare import answers, reading, table
    from mixquant.evaluate.compare.run import compare as run
    from mixquant.evaluate.compare.workload import agent_workload
    from mixquant.results import to_json

    logging.disable_progress_bar()  # ours tells the same

    chosen = chosen or saved_recipe(checkpoint)
    check_prefill_model(chosen, checkpoint)
    workload = agent_workload(load_tokenizer(checkpoint), text)
    with progress_bar() as progress:
        result = run(
            checkpoint,
            workload,
            chosen,
            arms=names,
            max_new_tokens=max_new_tokens,
            command=context.obj,
            progress=progress,
        )
    with ExitStack() as then:  # each of these is done whatever becomes of those before it
        if report_file is not None:
            then.callback(_write_report, report_file, result)
        if json_file is not None:
            then.callback(write_results, json_file, to_json(result))
        out.print(answers(result))
        out.print(table(result))
        if (sentence := reading(result)) is not None:
            out.print(sentence, highlight=False)


def _write_report(file: Path, result: Comparison) -> None:
    from mixquant.report import page

    write_whole(file, page([(None, result)]))
    say(f"Report with plots: {file.absolute()}")


def _arms(text: str) -> list[str]:
    from mixquant.evaluate.compare.run import ARMS

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ARMS:
            raise InputError(f"unknown arm {name!r}; expected {', '.join(ARMS)}")
    if not names:
        raise InputError(f"--arms: expected one or more of {', '.join(ARMS)}")
    return names
