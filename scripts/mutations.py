"""Breaks the code in one place at a time, and lists which tests fail.

    python scripts/mutations.py [--real] [NAME ...]

Each mutation is made in a copy of the tree, where the test files that should see it are run: unit tests,
or with ``--real`` those that start engines and servers. A mutation that nothing sees is a gap in the
tests, and the exit code is 1. A mutation whose text is no longer in the file has to be written anew.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
COPIED = ("src", "tests", "benchmarks", "scripts", "pyproject.toml", "README.md", "docs")


@dataclass(frozen=True)
class Mutation:
    """One place to break.

    Attributes:
        file: below src/mixquant.
        old, new: text that is in it once, and what is put in its place.
        unit: test files below tests/unit that should see it; tests marked slow are left out.
        real: test files below tests that start engines or servers and should see it.
    """

    file: str
    old: str
    new: str
    unit: tuple[str, ...]
    real: tuple[str, ...] = ()


ENGINE = ("engines/test_engine.py",)
MUTATIONS = {
    "precise rows left out": Mutation(
        "core/rows.py",
        "    if plan.precise:\n        put(precise(",
        "    if False:\n        put(precise(",
        ("core/test_rows.py", "engines/transformers/test_generate.py"),
    ),
    "a head of one token more": Mutation(
        "core/phase.py",
        "row_start + thresholds.precise_head - first",
        "row_start + thresholds.precise_head + 1 - first",
        ("core/test_phase.py", "engines/transformers/test_generate.py"),
        ENGINE,
    ),
    "no tail": Mutation(
        "core/phase.py",
        "row_start + prompt - thresholds.precise_tail - first",
        "row_start + prompt - first",
        ("core/test_phase.py", "engines/transformers/test_generate.py"),
        ENGINE,
    ),
    "a threshold of one row more": Mutation(
        "core/phase.py",
        "< thresholds.min_prefill_tokens:",
        "<= thresholds.min_prefill_tokens:",
        ("core/test_phase.py",),
        ENGINE,
    ),
    "positions off by one in vLLM": Mutation(
        "engines/vllm/follower.py",
        "np.append(batch.first_positions, -padding)",
        "np.append(batch.first_positions + 1, -padding)",
        ("engines/vllm/patches/test_runners.py",),
        ENGINE,
    ),
    "no room on the stack": Mutation(
        "engines/vllm/patches/runners.py",
        "return with_room(executing, self, *args, **kwargs)",
        "return executing(self, *args, **kwargs)",
        ("engines/vllm/patches/test_runners.py",),
    ),
    "the warm-up is counted": Mutation(
        "bench/run.py",
        "        load.send(url, name, point.run(0), point.concurrency)\n"
        "        before = read_counts(url)\n",
        "        before = read_counts(url)\n"
        "        load.send(url, name, point.run(0), point.concurrency)\n",
        ("bench/test_bench.py",),
    ),
    "a stale copy": Mutation(
        "engines/transformers/module.py",
        "        if copy is None or next(stale):\n",
        "        if copy is None or (next(stale) and False):\n",
        ("engines/transformers/test_changed_weights.py",),
    ),
    "a stale copy in vLLM": Mutation(
        "engines/vllm/linear/method.py",
        "            # Before super's: it may pack the weight and leave nothing behind.\n"
        "            self._make_products(layer)",
        "            self.products or self._make_products(layer)",
        ("engines/vllm/linear/test_method.py",),
        ("engines/test_architectures.py",),
    ),
    "scales of other rows": Mutation(
        "formats/fp8.py",
        "            product *= rows.scale\n",
        "            product *= rows.scale.flip(0)\n",
        ("formats/test_int8_and_fp8.py",),
    ),
    "an NVFP4 block scale of 4 for 6": Mutation(
        "formats/nvfp4_blocks.py",
        "scale = global_scale * (amax * (1 / e2m1.MAX))",
        "scale = global_scale * (amax * (1 / 4.0))",
        ("formats/test_nvfp4_blocks.py", "formats/test_nvfp4.py"),
    ),
    "experts of other rows": Mutation(
        "engines/vllm/experts/base.py",
        'put(precise(*(select(t, plan, "precise") for t in of_rows))',
        'put(precise(*(t[: plan.precise_rows] for t in of_rows))',
        ("engines/vllm/experts/test_experts.py",),
    ),
    "the front lets everything in": Mutation(
        "serve/accepted.py",
        "        if name in known:\n            kept[name] = _kept(one, known[name], ",
        "        if True:\n            kept[name] = _kept(one, known.get(name, DATA), ",
        ("serve/test_accepted.py", "serve/test_front.py"),
        ("servers/test_set.py",),
    ),
    "a graph serves too many precise rows": Mutation(
        "engines/vllm/graphs.py",
        "plan.precise_rows > FEW_ROWS:",
        "plan.precise_rows > 2 * FEW_ROWS:",
        ("engines/vllm/patches/test_runners.py",),
    ),
    "a graph's precise rows are not filled in": Mutation(
        "engines/vllm/graphs.py",
        "        if plan.precise:\n",
        "        if False:\n",
        ("engines/vllm/patches/test_runners.py",),
    ),
    "a first chunk's own keys in FP8": Mutation(
        "engines/vllm/attention/rows.py",
        "return self.context < max(self.rows, PRECISE_KEYS)",
        "return False",
        ("engines/vllm/attention/test_fp8.py", "engines/vllm/attention/test_layers.py"),
    ),
    "the mean of the values is left out in FP8": Mutation(
        "engines/vllm/attention/fp8.py",
        "sums = kernels.value_sums(values, table, run.segments)",
        "sums = kernels.value_sums(values, table, run.segments).zero_()",
        ("engines/vllm/attention/test_fp8.py",),
    ),
    "generated tokens attend in FP8": Mutation(
        "engines/vllm/attention/rows.py",
        "min(stop, row + count, row + prompt - first)",
        "min(stop, row + count)",
        ("engines/vllm/attention/test_layers.py",),
    ),
    "on a CPU a row sees the next key": Mutation(
        "kernels/cpu/attention.cpp",
        "sees = end + first + r - first_key;",
        "sees = end + first + r + 1 - first_key;",
        ("kernels/cpu/test_attention.py",),
    ),
    "on a CPU the mean of the values is left out": Mutation(
        "kernels/cpu/attention.cpp",
        "_mm512_mul_ps(mean, _mm512_set1_ps(tile.weight[r]))",
        "_mm512_setzero_ps()",
        ("kernels/cpu/test_attention.py",),
    ),
    "on a CPU the precise tail does not attend": Mutation(
        "engines/transformers/attention.py",
        "            for piece in ((0, start), (stop, rows)) if start < stop else ((0, rows),):",
        "            for piece in ((0, start),) if start < stop else ((0, rows),):",
        ("engines/transformers/test_attention.py",),
    ),
}  # fmt: skip


def failures(mutation: Mutation, *, real: bool) -> list[str]:
    """The names of the tests that fail; pytest's last lines, if it came to no result."""
    with tempfile.TemporaryDirectory(prefix="mixquant-mutation-") as name:
        tree = Path(name)
        for one in COPIED:
            source = REPOSITORY / one
            if source.is_dir():
                shutil.copytree(source, tree / one, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / one)
        file = tree / "src" / "mixquant" / mutation.file
        text = file.read_text()
        if text.count(mutation.old) != 1:
            sys.exit(f"{mutation.file} does not hold this text once: {mutation.old!r}")
        file.write_text(text.replace(mutation.old, mutation.new))
        files = mutation.real if real else tuple(f"unit/{one}" for one in mutation.unit)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no"]
        command += [] if real else ["-m", "not slow"]
        # The user's compiled libraries stay as they are.
        compiled_in = {"TORCH_EXTENSIONS_DIR": name} if file.suffix == ".cpp" else {}
        done = subprocess.run(
            [*command, *(f"tests/{one}" for one in files)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree / "src")} | compiled_in,
            capture_output=True,
            text=True,
        )
        failed = re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
        if done.returncode not in (0, 1):
            sys.exit(f"pytest came to no result:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return failed


def main() -> int:
    parser = argparse.ArgumentParser(description="Breaks the code, and lists which tests fail.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MUTATIONS)}")
    parser.add_argument("--real", action="store_true", help="run the tests of engines and servers")
    given = parser.parse_args()
    if unknown := set(given.names) - set(MUTATIONS):
        parser.error(f"no such mutation: {', '.join(sorted(unknown))}")
    unseen = 0
    print("| mutation | tests that fail | which |\n| --- | --- | --- |")
    for name in given.names or MUTATIONS:
        mutation = MUTATIONS[name]
        if given.real and not mutation.real:
            continue
        failed = failures(mutation, real=given.real)
        unseen += not failed
        tests = sorted({test.split("[")[0].rpartition("/")[2] for test in failed})
        shown = ", ".join(f"`{test}`" for test in tests[:3]) + (", ..." if len(tests) > 3 else "")
        print(f"| {name} | {len(failed)} | {shown or 'none'} |", flush=True)
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
