"""What the tests of the vLLM engine share: starting a process of engines, and the rule, spelled out."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import this_machine
from this_machine import ON_GPU

HERE = Path(__file__).parent


def require_vllm() -> None:
    """Skips a module where there is no vLLM, or where it would need a GPU that is not there."""
    pytest.importorskip("vllm", reason="vLLM is not installed")


class Results(dict[str, Any]):
    """Results by engine. A test that asks for an engine that was left out is skipped."""

    def __missing__(self, name: str) -> Any:
        pytest.skip(f"the engine {name!r} was left out (MIXQUANT_TEST_WITHOUT)")


def results_of(engines: dict[str, Any], folder: Path, seconds: int = 3600) -> Results:
    """Runs the engines (see `vllm_runs`) and returns their results; a crash fails with the log's end.

    A few processes, side by side, take one after the other as they get to it.
    Left out are those that MIXQUANT_TEST_WITHOUT names, for versions of vLLM that cannot run them.
    """
    without = os.environ.get("MIXQUANT_TEST_WITHOUT", "").split(",")
    spec = folder / "spec.json"
    spec.write_text(json.dumps({name: engines[name] for name in engines if name not in without}))
    # Starting an engine keeps one core busy, and where it compiles the model, several.
    count = max(1, min(6, (os.cpu_count() or 1) // 2)) if ON_GPU else 2
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    processes = []
    try:
        for number in range(count):
            part = folder / str(number)
            part.mkdir()
            command = [HERE / "vllm_runs.py", spec, part / "out.json"]
            with (part / "log.txt").open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
            processes.append((process, part))
        results = Results()
        for process, part in processes:
            process.wait(seconds)
            end_of_log = (part / "log.txt").read_text(errors="replace")[-3000:]
            assert process.returncode == 0, end_of_log
            its = json.loads((part / "out.json").read_text())
            failed = {name: result["error"] for name, result in its.items() if "error" in result}
            assert not failed, f"{failed}\n{end_of_log}"
            results.update(its)
        return results
    finally:
        for process, _ in processes:
            process.kill()
            process.wait()


def mixquant(**recipe: Any) -> dict[str, Any]:
    """The engine options for a recipe."""
    runs_here = {**this_machine.RECIPE, **recipe}
    return {"quantization": "mixquant", "additional_config": {"mixquant": runs_here}}


def rows_of(one: dict[str, Any]) -> list[tuple[Any, int, int, bool]]:
    """The rows of a traced pass: (request, position, prompt length, quantized)."""
    quantized = {row for start, stop in one["quantized"] for row in range(start, stop)}
    rows: list[tuple[Any, int, int, bool]] = []
    for request, first, count, prompt in zip(
        one["requests"],
        one["first_positions"],
        one["row_counts"],
        one["prompt_lengths"],
        strict=True,
    ):
        for position in range(first, first + count):
            rows.append((request, position, prompt, len(rows) in quantized))
    return rows


def by_the_rule(one: dict[str, Any], minimum: int, head: int, tail: int) -> list[bool]:
    """Whether each row of a traced pass should be quantized, row by row as the rule is written.

    On a GPU vLLM says itself which passes replay a graph; on a CPU there are none.
    """
    assert one["kind"] != "graph" or ON_GPU
    if one["kind"] == "graph":
        return [False] * sum(one["row_counts"])
    allowed = [head <= position < prompt - tail for _, position, prompt, _ in rows_of(one)]
    return allowed if sum(allowed) >= minimum else [False] * len(allowed)


def quantized_positions(run: dict[str, Any], request: int) -> list[int]:
    """The positions of a request that went through the model quantized, in order of time."""
    return [
        position
        for one in run["passes"]
        for number, position, _, quantized in rows_of(one)
        if number == request and quantized
    ]


def assert_rows_follow_the_rule(engine: dict[str, Any], minimum: int, head: int, tail: int) -> None:
    """Every row of an engine's passes is what the rule says, and some are quantized."""
    passes = [one for run in engine.values() for one in run["passes"]]
    for one in passes:
        assert [row[3] for row in rows_of(one)] == by_the_rule(one, minimum, head, tail), one
    assert sum(len(one["quantized"]) for one in passes) > 0


def divergence(
    run: dict[str, Any],
    request: int,
    other: dict[str, Any],
    its: int,
    *,
    apart: float | None = None,
) -> float:
    """KL divergence (nats) between two requests' distributions of the first token.

    Over the tokens that both list among their likeliest; what is left of either counts as one.

    Args:
        apart: the result where fewer than ten tokens are in both lists; None: the test fails.
    """
    p, q = run["logprobs"][request][0], other["logprobs"][its][0]
    both = p.keys() & q.keys()
    if len(both) < 10 and apart is not None:
        return apart
    assert len(both) >= 10, "the two distributions have hardly a token in common"
    kl = sum(math.exp(p[token]) * (p[token] - q[token]) for token in both)
    rest = [max(1e-9, 1 - sum(math.exp(x[token]) for token in both)) for x in (p, q)]
    return kl + rest[0] * math.log(rest[0] / rest[1])
