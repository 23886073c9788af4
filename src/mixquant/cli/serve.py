"""``mixquant serve``: an OpenAI-compatible server, on one engine or on many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mixquant.cli.deployment import rendered, run
from mixquant.cli.options import RecipeOption
from mixquant.serve.description import Deployment, ServeError, read

_SET = "A disaggregated set"
_ADDRESS = "Address"
_HOW = "Running"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Model directory, Hugging Face Hub name, or [bold]smollm2[/bold]. "
            "May be left out if the --config file names it.",
        ),
    ] = None,
    vllm_arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- VLLM...", help="vLLM arguments for every engine."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="YAML file with the same settings. Options override it.",
        ),
    ] = None,
    recipe: RecipeOption = None,
    prefill: Annotated[
        int | None,
        typer.Option(
            "--prefill",
            metavar="N",
            help="Number of prefill engines. They hold only quantized weights.",
            rich_help_panel=_SET,
        ),
    ] = None,
    decode: Annotated[
        int | None,
        typer.Option(
            "--decode",
            metavar="N",
            help="Number of decode engines. They run in BF16.",
            rich_help_panel=_SET,
        ),
    ] = None,
    prefill_gpus: Annotated[
        str | None,
        typer.Option(metavar="0,1,...", help="GPUs for the prefill engines.", rich_help_panel=_SET),
    ] = None,
    decode_gpus: Annotated[
        str | None,
        typer.Option(metavar="2,3,...", help="GPUs for the decode engines.", rich_help_panel=_SET),
    ] = None,
    prefill_args: Annotated[
        str | None,
        typer.Option(
            metavar="'ARGS'", help="vLLM arguments for prefill engines.", rich_help_panel=_SET
        ),
    ] = None,
    decode_args: Annotated[
        str | None,
        typer.Option(
            metavar="'ARGS'", help="vLLM arguments for decode engines.", rich_help_panel=_SET
        ),
    ] = None,
    min_transfer_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Estimated prompt length below which a decode engine also runs prefill.",
            rich_help_panel=_SET,
            show_default="256",
        ),
    ] = None,
    decode_fallback: Annotated[
        bool | None,
        typer.Option(
            "--decode-fallback/--no-decode-fallback",
            help="Let decode engines run prefill while no prefill engine is up.",
            rich_help_panel=_SET,
            show_default="on",
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="GPUs of each engine (tensor parallelism).", show_default="1"
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name of the model in requests.", rich_help_panel=_ADDRESS
        ),
    ] = None,
    tool_parser: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="vLLM parser for tool calls, or [bold]none[/bold].",
            show_default="by the model's chat template",
        ),
    ] = None,
    reasoning_parser: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="vLLM parser for reasoning, or [bold]none[/bold].",
            show_default="by the model's chat template",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host",  # left to itself, typer 0.27 calls it as its metavar, --HOST
            metavar="HOST",
            help="Address to listen on.",
            rich_help_panel=_ADDRESS,
            show_default="127.0.0.1",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            metavar="PORT",
            help="Port to listen on.",
            rich_help_panel=_ADDRESS,
            show_default="8000",
        ),
    ] = None,
    api_key_variable: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable that holds the API key that clients must send.",
            rich_help_panel=_ADDRESS,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File that holds the API key.", rich_help_panel=_ADDRESS),
    ] = None,
    logs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Directory for the logs, one for each process.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the commands and their environments, and start nothing.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    render: Annotated[
        Literal["compose", "kubernetes"] | None,
        typer.Option(
            "--render",
            help="Print a manifest that runs the same processes in containers.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Container image with vLLM and mixquant, for --render.",
            rich_help_panel=_HOW,
            show_default="compose builds one from vLLM's image",
        ),
    ] = None,
) -> None:
    """Serve a model with one engine for both phases, or with prefill engines and decode engines.

    vLLM arguments follow after [bold]--[/bold]:
    mixquant serve MODEL --prefill 2 --decode 1 -- --max-model-len 32768
    """
    values: dict[str, Any] = read(config) if config else {}
    given = {
        "model": model,
        "recipe": recipe,
        "prefill": prefill,
        "decode": decode,
        "prefill_gpus": prefill_gpus,
        "decode_gpus": decode_gpus,
        "vllm_arguments": vllm_arguments or None,
        "prefill_arguments": prefill_args,
        "decode_arguments": decode_args,
        "min_transfer_tokens": min_transfer_tokens,
        "decode_fallback": decode_fallback,
        "tensor_parallel_size": tensor_parallel_size,
        "served_model_name": served_model_name,
        "tool_parser": tool_parser,
        "reasoning_parser": reasoning_parser,
        "host": host,
        "port": port,
        "api_key_variable": api_key_variable,
        "api_key_file": api_key_file,
        "log_folder": logs,
    }
    values |= {name: value for name, value in given.items() if value is not None}
    if "model" not in values and config is None:
        raise ServeError("no model is named: give a MODEL, or name one in the file of --config")
    deployment = Deployment.from_values(values, f"{config}: " if config else "")
    if image is not None and render is None:
        raise ServeError("--image needs --render")
    if render is not None:
        print(rendered(deployment, render, image), end="")
    else:
        run(deployment, dry_run)
