"""`mixquant quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixquant.cli.console import progress_bar, say
from mixquant.cli.options import Model


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

    from mixquant.checkpoints.write import quantize as run

    logging.disable_progress_bar()  # ours tells the same
    with progress_bar() as report:
        written = run(
            model,
            out_dir,
            format,  # type: ignore[arg-type]  # checked there
            ignore=ignore or (),
            samples=samples,
            say=say,
            progress=report,
        )
    size = sum(file.stat().st_size for file in written.rglob("*"))
    say(f"wrote {written} ({size / 1e6:.0f} MB)")
