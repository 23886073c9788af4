"""`mixquant tune`."""

from __future__ import annotations

from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mixquant.checkpoints.models import find, load_tokenizer
from mixquant.cli.console import (
    InputError,
    check_writable,
    out,
    read_text,
    say,
    write_results,
)
from mixquant.cli.options import JsonFile, Model, finite, wait_briefly
from mixquant.cli.progress import progress_bar

# The most whose texts are long enough. All are even, so that topics searched on with one number are
# not held out with another.
DEFAULT_TEXTS = (24, 16, 8)


class TargetName(StrEnum):
    blackwell = "blackwell"
    hopper = "hopper"
    ada = "ada"
    ampere = "ampere"
    cpu = "cpu"


def tune(
    context: typer.Context,
    model: Model,
    kl: Annotated[
        float | None,
        typer.Option(
            "--kl",
            min=0.0,
            callback=finite,
            metavar="NATS",
            help="Largest KL from BF16, in nats per token.",
        ),
    ] = None,
    recovered: Annotated[
        float | None,
        typer.Option(
            "--recovered",
            min=0.0,
            max=1.0,
            callback=finite,
            metavar="SHARE",
            help="Least share to win back of what quantizing both phases loses, 0 to 1.",
            show_default="0.95",
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            min=0.0,
            callback=finite,
            metavar="BITS",
            help="Largest mean bits of a weight that prefill multiplies.",
        ),
    ] = None,
    target: Annotated[
        TargetName | None,
        typer.Option(
            "--target",
            help="Device that the recipe is for. Formats that are not native here are emulated.",
            show_default="this machine's",
        ),
    ] = None,
    prefill_model: Annotated[
        str | None,
        typer.Option(
            "--prefill-model",
            metavar="DIR",
            help="Checkpoint of mixquant quantize in the target's fastest format. Layers that have that "
            "format take their weights from it.",
        ),
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option(
            "--rates",
            metavar="FILE",
            help="Measured rates of products: the JSON file of benchmarks/ceilings.py.",
            show_default="NVFP4 : FP8 : INT8 : BF16 = 4 : 2 : 2 : 1",
        ),
    ] = None,
    cost_length: Annotated[
        int,
        typer.Option(
            "--cost-length",
            min=1,
            metavar="N",
            help="Prompt length whose prefill the cost model times, in tokens.",
        ),
    ] = 8192,
    length: Annotated[
        int,
        typer.Option(
            "--length", min=2, metavar="N", help="Length of the prompts searched on, in tokens."
        ),
    ] = 1024,
    check_length: Annotated[
        int | None,
        typer.Option(
            "--check-length",
            min=2,
            metavar="N",
            help="Length of the prompts that decide, in tokens.",
            show_default="--length",
        ),
    ] = None,
    answer_tokens: Annotated[
        int,
        typer.Option(
            "--answer-tokens", min=1, metavar="N", help="Tokens to compare after each prompt."
        ),
    ] = 64,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="UTF-8 text to search on. May be repeated.",
            show_default="Python's documentation",
        ),
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(
            "--held-out",
            metavar="FILE",
            help="UTF-8 text that decides; the search does not see it. May be repeated. Required "
            "with --text.",
            show_default="the other half of Python's documentation",
        ),
    ] = None,
    texts: Annotated[
        int | None,
        typer.Option(
            "--texts",
            min=2,
            metavar="N",
            help="Number of built-in texts. Half of them are held out.",
            show_default=f"{DEFAULT_TEXTS[0]}, fewer if prompts are long",
        ),
    ] = None,
    out_file: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Recipe to write.")
    ] = Path("recipe.json"),
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            metavar="DIR",
            help="Directory of the work done. A run that was interrupted goes on from it, and a run "
            "with another budget reuses it.",
            show_default="--out with the ending .work",
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Find the cheapest recipe within a budget (--kl, --recovered or --bits), and write it to a file.

    The recipe names a format for each projection of each layer, the block scale of NVFP4, and the tokens
    that stay precise at a prompt's start and end. Cost is the time of prefill's products by a model of
    the target. Texts that the search has not seen decide whether a recipe is within the budget.
    """
    from mixquant.tune.budget import Budget

    given = {"kl": kl, "recovered": recovered, "bits": bits}
    said = [(name, value) for name, value in given.items() if value is not None]
    if len(said) > 1:
        raise InputError("give one budget: --kl, --recovered or --bits")
    kind, value = said[0] if said else ("recovered", 0.95)
    budget = Budget(kind, value)  # type: ignore[arg-type]
    if (text is None) != (held_out is None):
        raise InputError(
            "give both --text and --held-out: texts to search on, and texts that decide"
        )
    if text and texts is not None:
        raise InputError("--texts counts the built-in texts; leave it out with --text")
    to_search = {str(file): read_text(file) for file in text or ()}
    to_decide = {str(file): read_text(file) for file in held_out or ()}
    for file in (out_file, json_file):
        if file is not None:
            check_writable(file)
    if json_file is not None and json_file.resolve() == out_file.resolve():
        raise InputError(f"--out and --json both name {out_file}: give two files")
    checkpoint = find(model, say)
    wait_briefly()

    import torch
    from transformers.utils import logging

    from mixquant.cli.tables.tune import tables
    from mixquant.evaluate.fidelity.passages import check_lengths, cut
    from mixquant.files.folders import alone_in
    from mixquant.results import to_json
    from mixquant.tune.run import Texts, Tuner
    from mixquant.tune.targets import target as target_of
    from mixquant.tune.targets import with_rates

    logging.disable_progress_bar()  # ours tells the same

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    aim = target_of(None if target is None else target.value, device)
    if rates is not None:
        aim = with_rates(aim, rates)
    checked = check_length or length
    check_lengths(checkpoint, [length, checked], answer_tokens)
    tokenizer = load_tokenizer(checkpoint)
    if not to_search:
        to_search, to_decide = (
            dict(list(_built_in(texts, tokenizer, tokens + answer_tokens).items())[half::2])
            for half, tokens in enumerate((length, checked))
        )
    searched, decide = (
        Texts(tuple(some), cut(some, tokenizer, [tokens], answer_tokens)[0])
        for some, tokens in ((to_search, length), (to_decide, checked))
    )
    folder = work or out_file.with_suffix(".work")
    try:
        with progress_bar() as progress:
            tuner = Tuner(
                checkpoint,
                aim,
                budget,
                searched,
                decide,
                cost_length,
                folder,
                prefill_model=prefill_model,
                command=context.obj,
                progress=progress,
                say=say,
            )
            with alone_in(folder, "--work"):
                tuned = tuner.run()
    except KeyboardInterrupt:
        say(f"Stopped. The work done is in {folder}; the same command continues from there.")
        raise
    with ExitStack() as then:
        if tuned.recipe.block_scale != "6":
            then.callback(
                say,
                f"The recipe was measured with block scales {tuned.recipe.block_scale} for weights and "
                "rows. vLLM on a GPU scales rows by 6, so the recipe may be further from BF16 there",
            )
        if checked < cost_length:
            then.callback(
                say,
                f"The budget was checked with prompts of {checked} tokens. For longer ones, give "
                "--check-length, or measure with mixquant fidelity --length",
            )
        # The last first: if both fail, the error is of the results, which have the recipe, too.
        if json_file is not None:
            then.callback(say, f"Results written to {json_file.absolute()}")
            then.callback(write_results, json_file, to_json(tuned.results))
        then.callback(say, f"Recipe written to {out_file.absolute()}")
        then.callback(write_results, out_file, tuned.recipe.to_json() + "\n")
        out.print(*tables(tuned.results), sep="")


def _built_in(number: int | None, tokenizer: Any, least: int) -> dict[str, str]:
    """So many built-in texts; None: the most of `DEFAULT_TEXTS` that have at least so many tokens."""
    from mixquant.evaluate.fidelity.passages import documentation

    texts: dict[str, str] = {}
    for one in DEFAULT_TEXTS if number is None else (number,):
        texts = documentation(one)
        if all(len(tokenizer(text)["input_ids"]) >= least for text in texts.values()):
            break
    return texts
