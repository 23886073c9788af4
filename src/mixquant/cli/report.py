"""`mixquant report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixquant.cli.console import check_writable, out, write_whole


def report(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="What bench, fidelity, evaluate or compare wrote."),
    ],
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page.")] = Path(
        "report.html"
    ),
) -> None:
    """Write one page of HTML with plots and tables from results files."""
    from mixquant.results import read

    check_writable(out_file)
    results = [(file.name, read(file)) for file in files]

    from mixquant.report import page

    write_whole(out_file, page(results))
    out.print(f"wrote {out_file.absolute()}", soft_wrap=True, highlight=False, markup=False)
