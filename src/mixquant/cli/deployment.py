"""From a description to a manifest, a dry run, or a running server."""

from __future__ import annotations

import tempfile
from pathlib import Path
from socket import socket
from typing import Any

import typer

from mixquant.checkpoints import models
from mixquant.cli.console import err, say
from mixquant.cli.progress import StageLines
from mixquant.serve.description import Deployment, ServeError


def rendered(deployment: Deployment, kind: str, image: str | None) -> str:
    """The manifest. Looks at a local checkpoint only: another machine may be the one that serves."""
    from mixquant.serve import render_compose, render_kubernetes

    renderer = {"compose": render_compose, "kubernetes": render_kubernetes}[kind]
    if "auto" not in (deployment.tool_parser, deployment.reasoning_parser):
        return renderer.render(deployment, image)
    if Path(deployment.model).is_dir():
        found = models.find(deployment.model, say)
        return renderer.render(_with_parsers(deployment, found), image)
    text = renderer.render(deployment, image)
    say(
        f"{deployment.model} is not a local directory, so its chat template is not read: give "
        "--tool-parser and --reasoning-parser, or requests with tools are refused"
    )
    return text


def run(described: Deployment, dry_run: bool) -> None:
    from mixquant.serve import checks
    from mixquant.serve.addresses import local_addresses
    from mixquant.serve.commands import dry_run as shown
    from mixquant.serve.commands import processes
    from mixquant.serve.description import api_key

    gpus = checks.visible_gpus()
    held = []
    if not dry_run:
        checks.check_packages(described)
        held = checks.reserve_port(described)  # from before a model is loaded
    checks.check_gpus(described, gpus)
    checkpoint = models.find(described.model, say)
    deployment = _with_parsers(described, checkpoint).model_copy(
        update={"model": checkpoint.source, "served_model_name": described.name}
    )
    checks.check_memory(deployment, checks.size_of_weights(checkpoint.source), gpus)
    started = processes(deployment, local_addresses(deployment), gpus=[gpu.name for gpu in gpus])
    if dry_run:
        print(shown(started), end="")
        return
    key = api_key(deployment)
    if key is None and deployment.host not in ("127.0.0.1", "::1", "localhost"):
        say(
            f"other machines can reach {deployment.host}, and no API key is set: see --api-key-variable"
        )
    folder = deployment.log_folder or Path(tempfile.mkdtemp(prefix="mixquant-logs-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServeError(f"cannot write logs to {folder}: {error.strerror or error}") from None
    listener = held[0] if deployment.disaggregated else None
    if code := _supervise(deployment, started, folder, key, listener):
        raise typer.Exit(code)


def _with_parsers(described: Deployment, checkpoint: models.Checkpoint) -> Deployment:
    """The description with the parsers that fit the model; prints which ones."""
    from mixquant.serve.parsers import parser_for

    found: dict[str, str] = {}
    model_type = str(checkpoint.config.get("model_type"))
    if described.tool_parser == "auto":
        tool = parser_for("tool", checkpoint.source, model_type)
        found["tool_parser"] = tool or "none"
        if tool:
            say(
                f"tool calls are parsed as {tool}, by the chat template "
                "(--tool-parser none turns this off)"
            )
        else:
            say(
                "tool calls are not parsed: no parser fits the chat template (--tool-parser NAME names "
                "one)"
            )
    if described.reasoning_parser == "auto":
        reasoning = parser_for("reasoning", checkpoint.source, model_type)
        found["reasoning_parser"] = reasoning or "none"
        if reasoning:
            say(
                f"reasoning is parsed as {reasoning}, by the chat template "
                "(--reasoning-parser none turns this off)"
            )
    return described.model_copy(update=found)


def _supervise(
    deployment: Deployment,
    started: list[Any],
    folder: Path,
    key: str | None,
    listener: socket | None,
) -> int:
    import asyncio

    from mixquant.serve.supervisor import Supervisor

    public = started[-1]
    kind = "one engine"
    if deployment.disaggregated:
        kind = f"{deployment.prefill} prefill and {deployment.decode} decode engines"
    with err.status("starting") if err.is_terminal else StageLines() as status:

        def ready() -> None:
            status.stop()
            print(
                f"ready: {public.address.url}/v1 serves {deployment.name} with {kind} "
                f"(logs: {folder})",
                flush=True,
            )

        async def run() -> int:
            supervisor = Supervisor(deployment, started, folder, key, say, status.update, listener)
            return await supervisor.run(ready)

        return asyncio.run(run())
