"""Texts that `mixquant tune` does not see with its built-in texts, for `mixquant fidelity --text`.

    python benchmarks/unseen_texts.py FOLDER

The built-in texts begin with the longest topics of Python's documentation. `docs-1` and `docs-2` are
made of shorter topics, which come in turns. `source-1` and `source-2` are two modules of the standard
library. Each has more than 8,192 tokens for SmolLM2.
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from pydoc_data.topics import topics

FIRST = 16  # of the topics by length; the beginnings of the built-in texts are longer ones


def texts() -> dict[str, str]:
    """The texts by name."""
    names = sorted(topics, key=lambda name: (-len(topics[name]), name))[FIRST:]
    found = {
        f"docs-{number + 1}": "\n\n".join(topics[name] for name in names[number::2])
        for number in range(2)
    }
    for number, module in enumerate((argparse, difflib)):
        found[f"source-{number + 1}"] = Path(str(module.__file__)).read_text(encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the files go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
