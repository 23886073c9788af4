"""`mixquant report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixquant.cli.console import check_writable, out, write_whole


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Results files of bench, fidelity, tune, evaluate or compare."
        ),
    ],
    out_file: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Report to write.")
    ] = Path("report.html"),
) -> None:
    """Write a report with plots and tables from results files, as one HTML page."""
    from mixquant.results import read

    check_writable(out_file)
    results = [(file.name, read(file)) for file in files]

    from mixquant.report import page

    write_whole(out_file, page(results))
    out.print(f"wrote {out_file.absolute()}", soft_wrap=True, highlight=False, markup=False)
