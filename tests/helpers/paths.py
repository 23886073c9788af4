"""Where the repository's folders are, for tests that read them."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
HELPERS = REPOSITORY / "tests" / "helpers"
DATA = REPOSITORY / "tests" / "data"
RESULTS = REPOSITORY / "benchmarks" / "results"
