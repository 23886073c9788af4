from collections.abc import Sequence
from mixquant.results import Results


def page(files: Sequence[tuple[str | None, Results]]) -> str:
    raise NotImplementedError
