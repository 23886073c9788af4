"""`mixquant quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixquant.cli.console import read_text, say
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
    rounding: Annotated[
        str,
        typer.Option(
            "--rounding",
            metavar="HOW",
            help="Rounding of the weights: nearest, or gptq, which is closer to BF16 and takes minutes "
            "longer.",
        ),
    ] = "nearest",
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            metavar="PATTERN",
            help="Name or glob pattern of a layer that stays in BF16. May be repeated.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=1,
            metavar="N",
            help="Number of pieces of 512 tokens to calibrate on.",
            show_default="16, or 64 with gptq",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="UTF-8 text to calibrate on, such as a log of your agent. May be repeated.",
            show_default="Python's documentation or library",
        ),
    ] = None,
) -> None:
    """Write a quantized checkpoint with llm-compressor, for the prefill_model of a recipe."""
    from transformers.utils import logging

    from mixquant.checkpoints.write import quantize as run

    calibrate_on = "\n\n".join(read_text(file) for file in text) if text else None
    logging.disable_progress_bar()  # ours tells the same
    with progress_bar() as report:
        written = run(
            model,
            out_dir,
            format,  # type: ignore[arg-type]  # checked there
            rounding=rounding,  # type: ignore[arg-type]  # checked there
            ignore=ignore or (),
            samples=samples,
            text=calibrate_on,
            say=say,
            progress=report,
        )
    size = sum(file.stat().st_size for file in written.rglob("*"))
    say(f"wrote {written} ({size / 1e6:.0f} MB)")
