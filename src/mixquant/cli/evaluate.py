"""`mixquant evaluate`."""

from __future__ import annotations

import importlib.util
import os
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixquant.checkpoints.models import find
from mixquant.cli.console import (
    InputError,
    check_writable,
    out,
    print_error,
    say,
    write_results,
)
from mixquant.cli.options import (
    MAX_COUNT,
    FormatOption,
    JsonFile,
    Model,
    RecipeOption,
    ServerArguments,
    chosen_recipe,
    finite,
    lengths,
    saved_recipe,
    temperature_option,
)
from mixquant.cli.progress import answer_progress
from mixquant.core.recipe import Recipe

if TYPE_CHECKING:
    from mixquant.evaluate.benchmarks.plan import Judge

JUDGE_KEYS = ("MIXQUANT_JUDGE_KEY", "OPENAI_API_KEY")
SERVER_KEY = "VLLM_API_KEY"  # vLLM itself reads this variable
RESULTS = "results.json"


class ProtocolName(StrEnum):
    mix_quant = "mix-quant"


def evaluate(
    context: typer.Context,
    model: Model,
    benchmark: Annotated[
        list[str],
        typer.Option(
            "--benchmark",
            metavar="NAME",
            help="Benchmark to run; list prints all names. May be repeated.",
        ),
    ],
    protocol: Annotated[
        ProtocolName | None,
        typer.Option(
            "--protocol",
            help="Ask and score as others do: mix-quant, as the scripts of the paper's authors.",
            show_default="mixquant's own",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="[NAME=]FILE",
            help="Data of a benchmark, in its published schema.",
            show_default="downloaded from the Hugging Face Hub",
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            metavar="NAME[=ARGUMENTS]",
            help="What to evaluate: bf16, quantized, mixquant, or a name of your own with vLLM "
            "arguments. May be repeated.",
            show_default="bf16, quantized, mixquant",
        ),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(
            "--url",
            metavar="NAME=URL",
            help="Evaluate an OpenAI-compatible server that already runs. May be repeated.",
        ),
    ] = None,
    served_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-name",
            metavar="NAME",
            help="Name of the model at the servers. May be repeated; a server is asked for the first "
            "that it has.",
            show_default="MODEL",
        ),
    ] = None,
    recipe: RecipeOption = None,
    format: FormatOption = None,
    vllm_args: ServerArguments = "",
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds",
            min=1,
            metavar="N",
            help="Number of answers to each item, each with its own seed.",
            show_default="by benchmark",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, metavar="N", help="Ask at most this many items of each benchmark."
        ),
    ] = None,
    length: Annotated[
        list[str] | None,
        typer.Option(
            "--length",
            metavar="N[,N...]",
            help="Lengths of needle's prompts with their answers, in tokens, from 512 to 131072. May "
            "be repeated.",
            show_default="1024,2048,4096,8192, as far as the model reads",
        ),
    ] = None,
    cot: Annotated[
        bool | None,
        typer.Option(
            "--cot/--no-cot",
            help="Ask LongBench v2 with the prompt for chains of thought.",
            show_default="by protocol",
        ),
    ] = None,
    no_context: Annotated[
        bool,
        typer.Option("--no-context", help="Ask LongBench v2 without its documents."),
    ] = False,
    retrieved: Annotated[
        int | None,
        typer.Option(
            "--retrieved",
            min=1,
            metavar="N",
            help="Ask LongBench v2 with the first N pieces of each record's retrieved_context in "
            "place of its document.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            min=0.0,
            callback=temperature_option,
            help="Sampling temperature; 0 takes the likeliest token.",
            show_default="0.6; needle: 0",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            min=0.0,
            max=1.0,
            callback=finite,
            help="Sample from the likeliest tokens that hold this share of the probability.",
            show_default="0.95; needle: 1",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            min=-1,
            max=MAX_COUNT,
            help="Sample from this many of the likeliest tokens; -1 samples from all.",
            show_default="20; needle: -1",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=1,
            help="Maximum length of an answer with its reasoning, in tokens.",
            show_default="by benchmark",
        ),
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Let models that can reason do so before they answer.",
            show_default="thinking, but not for needle",
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=1,
            metavar="N",
            help="Context length to use, in tokens, if smaller than the model's.",
        ),
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(
            "--judge-url",
            metavar="URL",
            help="OpenAI-compatible server that judges answers. Its API key is read from "
            f"{' or '.join(JUDGE_KEYS)}.",
        ),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option("--judge-model", metavar="NAME", help="Name of the model that judges."),
    ] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, metavar="N", help="Items to work on at a time.")
    ] = 16,
    retries: Annotated[
        int,
        typer.Option("--retries", min=0, metavar="N", help="Times to retry a request that fails."),
    ] = 8,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            min=0.1,
            callback=finite,
            metavar="SECONDS",
            help="Time limit of one request.",
        ),
    ] = 3600,
    out_dir: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Directory for the answers. A run that was stopped continues from it.",
        ),
    ] = Path("mixquant-evaluation"),
    json_file: JsonFile = None,
) -> None:
    """Run benchmarks in BF16, fully quantized and with mixquant, and compare the scores."""
    if "list" in benchmark:
        from mixquant.evaluate.tasks.registry import TASKS

        for name in TASKS:
            out.print(name)
        return
    for package in ("openai", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed: pip install 'mixquant[eval]'")
    if json_file is not None:
        check_writable(json_file)
    judge = _judge(judge_url, judge_model)

    from mixquant.cli.tables.scores import tables
    from mixquant.evaluate.benchmarks.plan import Options
    from mixquant.evaluate.benchmarks.run import evaluate as run
    from mixquant.evaluate.benchmarks.runner import RunError
    from mixquant.results import to_json
    from mixquant.servers.arms import chosen_arms

    chosen = chosen_recipe(recipe, format)
    if chosen is None:  # servers that already run need no model on this machine
        chosen = Recipe() if url and not arm else saved_recipe(find(model, say))
    given = {
        "lengths": lengths(length),
        "cot": cot,
        "no_context": no_context or None,
        "retrieved": retrieved,
    }
    task_options = {key: value for key, value in given.items() if value not in (None, [])}
    options = Options(
        model=model,
        benchmarks=benchmark,
        arms=chosen_arms(chosen, arm or (), url or (), vllm_args),
        out=out_dir,
        data=_data(data or [], benchmark),
        settings={
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "max_tokens": max_tokens,
            "thinking": thinking,
            "seeds": seeds,
        },
        task_options=task_options,
        protocol=None if protocol is None else protocol.value,
        judge=judge,
        served_names=served_name or (),
        key=os.environ.get(SERVER_KEY),
        limit=limit,
        context=max_context,
        concurrency=concurrency,
        retries=retries,
        timeout=timeout,
        command=context.obj or "",
    )
    try:
        with answer_progress() as progress:
            result, problems = run(options, progress)
    except KeyboardInterrupt:
        say(f"Stopped. Finished answers are in {out_dir}; the same command continues from there.")
        raise
    except RunError as error:
        print_error(str(error))
        raise typer.Exit(1) from None
    with ExitStack() as then:  # each step is done even if an earlier one fails
        for file in (json_file, out_dir / RESULTS):
            if file is not None:
                then.callback(write_results, file, to_json(result))
        for table in tables(result):
            out.print(table)
    if problems:
        for problem in problems:
            say(problem)
        print_error("some requests failed; the same command asks them again")
        raise typer.Exit(1)


def _judge(url: str | None, model: str | None) -> Judge | None:
    from mixquant.evaluate.benchmarks.plan import Judge

    if url is None and model is None:
        return None
    if url is None or model is None:
        raise InputError("give both --judge-url and --judge-model")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"--judge-url {url!r}: expected a URL with http:// or https://")
    key = next((os.environ[name] for name in JUDGE_KEYS if os.environ.get(name)), None)
    if key is None:
        raise InputError(
            f"the judge's key is missing: set the environment variable {' or '.join(JUDGE_KEYS)} "
            "(any value, if the judge needs none)"
        )
    return Judge(url.rstrip("/").removesuffix("/v1"), model, key)


def _data(given: list[str], benchmarks: list[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for text in given:
        name, named, file = text.partition("=")
        if not named or name not in benchmarks:
            if len(benchmarks) > 1 or (named and not os.path.exists(text)):
                raise InputError(
                    f"--data {text!r}: expected NAME=FILE with one of {', '.join(benchmarks)}"
                )
            name, file = benchmarks[0], text
        if name in files:
            raise InputError(f"--data names two files for {name}")
        files[name] = Path(os.path.expanduser(file))
    return files
