"""`mixquant quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixquant.cli.console import say
from mixquant.cli.options import Model
from mixquant.cli.progress import progress_bar


def quantize(
    model: Model,
    out_dir: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory to write; new or empty.")
    ],
    format: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="Format of the weights: nvfp4 or fp8.")
    ] = "nvfp4",
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            metavar="PATTERN",
            help="Name or glob pattern of a layer that stays in BF16. May be repeated.",
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples", min=1, metavar="N", help="Number of texts to calibrate nvfp4 on."
        ),
    ] = 16,
) -> None:
    """Write a quantized checkpoint with llm-compressor, for the prefill_model of a recipe."""
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
