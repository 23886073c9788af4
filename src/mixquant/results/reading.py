"""Writes results files as text, and reads them with every field checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    Field,
    TypeAdapter,
    ValidationError,
)

from mixquant.errors import MixquantError
from mixquant.files.reading import ReadingError, parse_json, shown
from mixquant.results.bench import Bench
from mixquant.results.comparison import Comparison
from mixquant.results.evaluation import Evaluation
from mixquant.results.fidelity import Fidelity
from mixquant.results.tuning import Tuning


class ResultsError(MixquantError, ValueError):
    """A results file that cannot be used. The message is one line."""


_LARGEST = 1e30  # a larger figure could make a square, a sum or an axis infinite
Results = Bench | Fidelity | Evaluation | Comparison | Tuning


def to_json(results: Results) -> str:
    return results.model_dump_json(indent=2) + "\n"


def read(path: Path) -> Results:
    """The results in a file.

    Raises:
        ResultsError: no such file, no JSON, or not what this version writes.
    """
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ResultsError(f"cannot read {path}: it is not UTF-8 text") from None
    except ReadingError as error:
        raise ResultsError(f"{path} is not JSON: {error}") from None
    if (large := _too_large(values)) is not None:
        raise ResultsError(
            f"{path}: field {large!r} is beyond {_LARGEST:g}, which no measurement gives"
        )
    adapter: TypeAdapter[Results] = TypeAdapter(Annotated[Results, Field(discriminator="kind")])
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"].startswith("union_tag"):
            raise ResultsError(
                f"{path} is not a results file of mixquant: field 'kind' must be bench, fidelity, "
                "evaluation, comparison or tuning"
            ) from None
        where = ".".join(str(part) for part in first["loc"][1:]) or "kind"
        raise ResultsError(
            f"{path} is not a results file of this version of mixquant: field {shown(where)}: "
            f"{first['msg']}"
        ) from None


def _too_large(value: Any, name: str = "") -> str | None:
    """The name of a number that is too large to compute with, or None."""
    if isinstance(value, (int, float)):
        return name if abs(value) > _LARGEST else None
    pairs = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        pairs = enumerate(value)  # type: ignore[assignment]
    found = (_too_large(part, f"{name}.{key}".lstrip(".")) for key, part in pairs)
    return next((one for one in found if one is not None), None)
