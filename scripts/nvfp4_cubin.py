"""Compiles the Triton kernels of NVFP4 where there is no GPU, for a machine that has one.

A host whose own Triton is older than 3.9 can run them all the same: what a launcher has to know is
in kernels.json (tests/unit/kernels/triton/test_nvfp4.py has one, with CuPy).

    PYTHONPATH=.venv/triton .venv/bin/python scripts/nvfp4_cubin.py build/nvfp4_sm90
"""

import argparse
import json
from pathlib import Path
from typing import Any

import triton

from mixquant.kernels.triton.nvfp4 import compile_for

# Triton's launcher appends these two to every kernel's arguments; null where their size is zero.
HIDDEN = [["global_scratch", "*i8"], ["profile_scratch", "*i8"]]


def describe(kernel: Any, file: str) -> dict[str, Any]:
    """What a launcher has to know. Argument types are Triton's; ``shared`` is in bytes."""
    metadata, source = kernel.metadata, kernel.src
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
        raise SystemExit(f"{metadata.name} needs scratch memory or a cluster")
    names = list(source.signature)
    return {
        "file": file,
        "symbol": metadata.name,
        "num_warps": metadata.num_warps,
        "shared": metadata.shared,
        "constants": {names[index]: value for (index,), value in source.constants.items()},
        "arguments": [
            [name, kind] for name, kind in source.signature.items() if kind != "constexpr"
        ]
        + HIDDEN,
        # Pointers in bytes, numbers as they are.
        "multiples_of_16": [names[index] for (index,) in source.attrs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where kernels.json, *.cubin and *.ptx go")
    parser.add_argument("--capability", type=int, default=90, help="times ten (default: 90)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kernels = {}
    for name, kernel in compile_for(arguments.capability).items():
        (arguments.folder / f"{name}.cubin").write_bytes(kernel.asm["cubin"])
        (arguments.folder / f"{name}.ptx").write_text(kernel.asm["ptx"])
        kernels[name] = describe(kernel, f"{name}.cubin")
    described = {
        "triton": triton.__version__,
        "capability": arguments.capability,
        "kernels": kernels,
    }
    (arguments.folder / "kernels.json").write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    main()
