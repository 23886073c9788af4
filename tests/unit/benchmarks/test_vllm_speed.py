"""The tables of benchmarks/vllm_speed.py, also of a run that was cut off."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

import pytest
import vllm_speed


def row(arm: str, tokens: int, cached: int, value: float, **changes: Any) -> dict[str, Any]:
    one = {"arm": arm, "metric": "ttft", "workload": "turns", "tokens": tokens, "cached": cached}
    return {**one, "concurrency": 1, "value": value, "unit": "ms", **changes}


def test_turns_of_a_run_that_was_cut_off() -> None:
    rows = [row("bf16", 128, 0, 15.0), row("mixquant", 128, 0, 10.0), row("bf16", 128, 64, 20.0)]
    assert vllm_speed.tables(rows).splitlines()[2:] == ["| 128 | 15.0 / 10.0 = 1.50 | - |"]


def test_shares_are_in_no_table() -> None:
    rows = [row("bf16", 128, 0, 15.0), row("mixquant", 128, 0, 10.0)]
    share = row("mixquant", 128, 0, 1.0, metric="quantized", unit="share")
    assert vllm_speed.tables([*rows, share]) == vllm_speed.tables(rows)


def test_what_was_measured_is_a_results_file() -> None:
    options = argparse.Namespace(json=None, traces=None, model="m")
    run = vllm_speed.run_of(options, [row("mixquant", 128, 0, 10.0)], [])
    assert [one.name for one in run.arms] == ["mixquant"]
    assert [one.value for one in run.results] == [10.0]


def test_an_arm_that_fails_ends_the_run() -> None:
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    ended.wait()
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(SystemExit, match="fp8: ended with 3"):
            vllm_speed.wait_for([("bf16", running), ("fp8", ended)])
    finally:
        running.kill()
        running.wait()
