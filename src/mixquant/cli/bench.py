"""`mixquant bench`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mixquant.bench.environment import environment
from mixquant.checkpoints.models import Checkpoint, find, load_tokenizer
from mixquant.cli.console import (
    InputError,
    check_writable,
    out,
    say,
    write_results,
    write_so_far,
)
from mixquant.cli.options import (
    LARGEST_SEED,
    FormatOption,
    JsonFile,
    Model,
    RecipeOption,
    ServedName,
    ServerArguments,
    chosen_recipe,
    saved_recipe,
)
from mixquant.cli.progress import progress_bar
from mixquant.core.recipe import Recipe
from mixquant.files import scratch
from mixquant.files.reading import shown

if TYPE_CHECKING:
    from mixquant.bench.workloads import LoadPoint
    from mixquant.results import Measurement
    from mixquant.servers.arms import ServedArm

DEFAULT_LENGTHS = (512, 2048, 8192)
DEFAULT_BATCHES = (1, 4, 16)
DEFAULT_CONCURRENCIES = (1, 8)
DEFAULT_CACHED = (0, 8192)


def _shown(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def bench(
    context: typer.Context,
    model: Model,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            metavar="NAME[=ARGUMENTS]",
            help="What to measure: bf16, quantized, mixquant, or a name of your own with vLLM "
            "arguments, such as 'fp8=--quantization fp8'. May be repeated.",
            show_default="bf16, quantized, mixquant",
        ),
    ] = None,
    urls: Annotated[
        list[str] | None,
        typer.Option(
            "--url",
            metavar="NAME=URL",
            help="Measure an OpenAI-compatible server that already runs. May be repeated. Its API key "
            "is read from OPENAI_API_KEY.",
        ),
    ] = None,
    served_name: ServedName = None,
    engine: Annotated[
        Literal["vllm", "transformers"],
        typer.Option(
            "--engine",
            help="Engine that runs the model. transformers runs in this process and measures "
            "prompt lengths only.",
        ),
    ] = "vllm",
    recipe: RecipeOption = None,
    format: FormatOption = None,
    vllm_args: ServerArguments = "",
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="N,N,...",
            help="Prompt lengths to measure, in tokens, or none.",
            show_default=_shown(DEFAULT_LENGTHS),
        ),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(
            "--batches",
            metavar="N,N,...",
            help="Batch sizes to measure (requests sent at once), or none.",
            show_default=_shown(DEFAULT_BATCHES),
        ),
    ] = None,
    concurrencies: Annotated[
        str | None,
        typer.Option(
            "--concurrencies",
            metavar="N,N,...",
            help="Numbers of requests in flight to measure (for the trace: of sessions), or none.",
            show_default=_shown(DEFAULT_CONCURRENCIES),
        ),
    ] = None,
    turns: Annotated[
        str | None,
        typer.Option(
            "--turns",
            metavar="N,N,...",
            help="Turns of an agent to measure: numbers of new tokens, each behind each of --cached. "
            "Ends with the recipe that leaves shorter turns in BF16.",
            show_default="none",
        ),
    ] = None,
    cached: Annotated[
        str | None,
        typer.Option(
            "--cached",
            metavar="N,N,...",
            help="Tokens that the prefix cache holds before each of the --turns.",
            show_default=_shown(DEFAULT_CACHED),
        ),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Agent trace to replay: a JSONL file, builtin, or none.",
            show_default="builtin",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int,
        typer.Option(
            "--prompt-tokens", min=1, help="Prompt length for --batches and --concurrencies."
        ),
    ] = 1024,
    output_tokens: Annotated[
        int, typer.Option("--output-tokens", min=1, help="Answer length, except in the trace.")
    ] = 32,
    repeats: Annotated[
        int,
        typer.Option("--repeats", min=1, help="Times to repeat each measurement after a warm-up."),
    ] = 3,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            max=LARGEST_SEED,
            help="Seed of the prompts. With a seed that was used before, a running server finds them "
            "in its prefix cache.",
            show_default="a new one",
        ),
    ] = None,
    json_file: JsonFile = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(
            "--log-dir",
            metavar="DIR",
            help="Directory to keep the servers' logs in.",
            show_default="logs are kept only after an error",
        ),
    ] = None,
) -> None:
    """Measure time to first token, time per output token and throughput of each arm."""
    from mixquant.bench.run import check_server, run
    from mixquant.bench.trace import BUILTIN, read_trace
    from mixquant.bench.workloads import Plan, points
    from mixquant.cli.tables.speed import tables, threshold
    from mixquant.results import Bench, to_json
    from mixquant.servers.arms import chosen_arms

    chosen = chosen_recipe(recipe, format)
    in_process = engine == "transformers"
    if in_process:
        given = {"--url": urls, "--vllm-args": vllm_args, "--batches": batches}
        given |= {"--concurrencies": concurrencies, "--trace": trace, "--served-name": served_name}
        given |= {"--turns": turns, "--cached": cached}
        given |= {"--arm NAME=ARGUMENTS": [arm for arm in arms or () if "=" in arm]}
        for option, value in given.items():
            if value and value != "none":
                raise InputError(
                    f"{option} needs --engine vllm: --engine transformers measures prompt lengths only"
                )
        batches = concurrencies = trace = "none"
    numbers = {
        "--lengths": _numbers("--lengths", lengths, DEFAULT_LENGTHS),
        "--batches": _numbers("--batches", batches, DEFAULT_BATCHES),
        "--concurrencies": _numbers("--concurrencies", concurrencies, DEFAULT_CONCURRENCIES),
        "--turns": _numbers("--turns", turns, ()),
        "--cached": _numbers("--cached", cached, DEFAULT_CACHED, least=0),
    }
    if json_file is not None:
        check_writable(json_file)
    sessions = () if trace == "none" else tuple(read_trace(trace or BUILTIN))
    plan = Plan(
        lengths=numbers["--lengths"],
        batches=numbers["--batches"],
        concurrencies=numbers["--concurrencies"],
        turns=numbers["--turns"],
        cached=numbers["--cached"],
        sessions=sessions,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seed=secrets.randbelow(2**32) if seed is None else seed,
    )
    chosen_arms(chosen or Recipe(), arms or (), urls or (), vllm_args)  # before any download
    checkpoint = find(model, say)
    compared = chosen_arms(chosen or saved_recipe(checkpoint), arms or (), urls or (), vllm_args)
    given_by = {"length": lengths, "batch": batches, "concurrency": concurrencies, "agent": trace}
    given_by |= {"turns": turns}
    chosen_workloads = {name for name, given in given_by.items() if given is not None}
    left, left_out = _that_fit(
        points(plan, load_tokenizer(checkpoint)), checkpoint, chosen_workloads
    )
    if not left:
        raise InputError("there is nothing to measure: every workload is none, or too long")
    name = served_name or model
    for arm in compared:
        if arm.url is not None:
            check_server(arm.url, name, left)

    for message in left_out:
        say(message)

    measured_on = environment(elsewhere=all(arm.url for arm in compared))
    settings = {
        "engine": engine,
        "output_tokens": output_tokens,
        "repeats": repeats,
        "seed": plan.seed,
        "trace": trace or BUILTIN,
    }
    found: list[Measurement] = []

    def result(done: Sequence[ServedArm]) -> Bench:
        return Bench(
            environment=measured_on,
            command=context.obj,
            model=checkpoint.name,
            arms=tuple(arm.to_result() for arm in done),
            settings=settings,
            results=tuple(found),
        )

    done: list[ServedArm] = []
    try:
        with _logs(log_dir) as logs, progress_bar() as report:
            if in_process:
                from mixquant.bench import in_process as on_transformers

                measured = on_transformers.run(compared, checkpoint, left, repeats, report)
            else:
                measured = run(compared, checkpoint.source, name, left, repeats, logs, report)
            for arm, figures in measured:
                done.append(arm)
                found += figures
                if json_file is not None:  # now: the next arm may fail, or take an hour
                    write_so_far(json_file, to_json(result(done)))
    finally:
        with ExitStack() as then:
            if json_file is not None and done:
                then.callback(write_results, json_file, to_json(result(done)))
            for table in tables(found):
                out.print(table)
                out.print()
            if (sentence := threshold(found)) is not None:
                out.print(sentence, highlight=False)
        if done and len(done) < len(compared):
            kept = f" (results in {json_file})" if json_file is not None else ""
            say(f"finished: {', '.join(arm.name for arm in done)}{kept}")


def _numbers(
    option: str, text: str | None, default: tuple[int, ...], least: int = 1
) -> tuple[int, ...]:
    if text is None:
        return default
    if text.strip() == "none":
        return ()
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = [-1]
    if numbers[0] < least:
        raise InputError(
            f"{option} {shown(text)}: expected numbers from {least}, separated by commas, or none"
        )
    return tuple(numbers)


def _that_fit(
    points: Sequence[LoadPoint], checkpoint: Checkpoint, chosen: set[str]
) -> tuple[list[LoadPoint], list[str]]:
    """The points that fit the model's context, and a message for each point that does not.

    Raises:
        InputError: that was chosen by the user.
    """
    fitting: list[LoadPoint] = []
    left_out: list[str] = []
    for point in points:
        if checkpoint.context is None or point.longest <= checkpoint.context:
            fitting.append(point)
            continue
        too_long = (
            f"{point.name}: {point.longest} tokens exceed the context of {checkpoint.name}, "
            f"{checkpoint.context}"
        )
        if point.workload in chosen:
            raise InputError(too_long)
        left_out.append(f"skipped {too_long}")
    return fitting, left_out


@contextmanager
def _logs(directory: Path | None) -> Iterator[Path]:
    """The user's directory, or a temporary one that is kept only after an error."""
    if directory is not None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write into {directory}: {error.strerror or error}") from None
        check_writable(directory / "any.log")
        yield directory
        return
    own = scratch.make("bench")
    try:
        yield own
    except KeyboardInterrupt:
        scratch.remove(own)
        raise
    except BaseException:
        scratch.keep(own)
        raise
    scratch.remove(own)
