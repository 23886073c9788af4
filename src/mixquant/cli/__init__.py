"""The command line: parse, call, print. One module for each command; this one joins them."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from mixquant._after_import import after_import
from mixquant._version import __version__
from mixquant.cli.bench import bench
from mixquant.cli.chat import chat
from mixquant.cli.compare import compare
from mixquant.cli.console import InputError, print_error
from mixquant.cli.evaluate import evaluate
from mixquant.cli.fidelity import fidelity
from mixquant.cli.generate import generate
from mixquant.cli.info import info
from mixquant.cli.quantize import quantize
from mixquant.cli.report import report
from mixquant.cli.serve import serve
from mixquant.cli.tune import tune
from mixquant.errors import MixquantError

app = typer.Typer(
    help="Phase-aware quantized inference for LLM agents: prefill in low precision, decode in BF16.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    generate,
    chat,
    serve,
    compare,
    bench,
    evaluate,
    fidelity,
    tune,
    quantize,
    report,
    info,
):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mixquant {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def _check_text(arguments: Sequence[str]) -> None:
    """Refuses bytes that are not text. Python passes them on as lone surrogates, which cannot be
    encoded."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = argument.encode(errors="backslashreplace").decode()
            raise InputError(f"the argument '{shown[:100]}' is not UTF-8 text") from None


# Loggers that warn during the import of Transformers or vLLM, about things that users cannot change.
_NOISY_IMPORTS = ("torchao", "torch.utils._pytree", "vllm")


def _quieten_transformers(hf_logging: Any) -> None:
    """Turns off warnings, which are for programmers, and progress bars in files."""
    hf_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()


def _quieten_hub(utils: Any) -> None:
    if not sys.stderr.isatty():
        utils.disable_progress_bars()


def _quieten_vllm(vllm_logger: Any) -> None:
    """vLLM sets the level of its loggers again, halfway through its import."""
    logging.getLogger("vllm").setLevel(logging.ERROR)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code.

    0: done; 2: an argument, an option or a file cannot be used; 1: an unexpected error. Each error
    is one line on standard error. With the environment variable MIXQUANT_TRACEBACK set, the error
    is raised.
    """
    for name in _NOISY_IMPORTS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Only once a command imports them: the imports take seconds, and --help needs none of them.
    after_import("transformers.utils.logging", _quieten_transformers)
    after_import("huggingface_hub.utils", _quieten_hub)
    after_import("vllm.logger", _quieten_vllm)
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        _check_text(arguments)
        code = app(
            args=list(arguments) or ["--help"],
            prog_name="mixquant",
            standalone_mode=False,
            obj=shlex.join(["mixquant", *arguments]),  # for the files that commands write
        )
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader of our output is gone. Python would raise the error again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("MIXQUANT_TRACEBACK"):
            raise
        if isinstance(error, MixquantError):
            print_error(str(error))
            return 2
        # typer's error, whose class is in another module in each version.
        if hasattr(error, "format_message"):
            command = getattr(getattr(error, "ctx", None), "command_path", "mixquant")
            print_error(f"{error.format_message()} ({command} --help)")
            return 2
        print_error(f"{type(error).__name__}: {error} (MIXQUANT_TRACEBACK=1 shows where)")
        return 1
