"""Prefill and decode speed of vLLM: BF16, vLLM's FP8 everywhere, and mixquant, in one run.

    python benchmarks/vllm_speed.py --model benchmarks/models/qwen3-8b --json FILE
    python benchmarks/vllm_speed.py --model benchmarks/models/qwen3-8b --turns --json FILE
    python benchmarks/vllm_speed.py --show FILE

Each arm is an engine in a process of its own, on random weights in the shape of the model (a
directory with a config.json is enough), of such size that activations are about 1 as in a real model
(vLLM's own dummy weights are tiny, and FP8 attention would multiply zeros, which takes a GPU less
power and so less time), and random tokens, chunks of 8,192. Engines may start together (--together), but
are measured one at a time, the others idle; round by round where the time depends on the host's CPU,
which is slower for seconds at a time, and all on the same few cores, as a host's cores differ. TTFT is
the time of a request for one token; TPOT the rest of a longer one's. Medians; ratios hold within one
run only.

Without --turns the prefix cache is off. With it, an agent's turns are measured: so many new tokens
behind so many that the prefix cache holds, in engines that capture CUDA graphs as vLLM does by default.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from command_line import command_line
from filelock import FileLock
from kernel_times import by_kind, count_launches, events, longest, trace_of

from mixquant.engines.vllm.counters import Counters
from mixquant.results import Arm, Bench, Environment, Measurement, Piece, to_json


def mixquant(**recipe: Any) -> dict[str, Any]:
    return {
        "quantization": "mixquant",
        "additional_config": {"mixquant": {"preset": "fast", "precise_tail": 1, **recipe}},
    }


ARMS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"quantization": "fp8"},
    "mixquant, BF16 attention": mixquant(prefill_attention="bf16"),
    "mixquant": mixquant(),
    # Graphs of the sizes that vLLM captures by default: those that are chosen stay as they are.
    "mixquant, without quantized graphs": {**mixquant(), "max_cudagraph_capture_size": 512},
    "FP8 attention alone": mixquant(preset="exact", prefill_attention="fp8"),
    "FP8 everywhere and FP8 attention": mixquant(everywhere=True),
    "bf16 with graphs": {"max_cudagraph_capture_size": 4096},
    "fp8 with graphs": {"quantization": "fp8", "max_cudagraph_capture_size": 4096},
    # Of the KV cache, in tokens; vLLM's are of 16. It handles each one in Python when a turn begins.
    "bf16, blocks of 64": {"block_size": 64},
    "mixquant, blocks of 64": {**mixquant(), "block_size": 64},
    "mixquant, blocks of 128": {**mixquant(), "block_size": 128},
}
NEW = (128, 256, 512, 1024, 2048, 4096, 8192)  # tokens of a turn
ROUNDS = 3  # in which engines measure in turns what a host's CPU bounds
ROUNDS_OF_TURNS = 8  # the same for an agent's; of longer ones, every third
PROFILED = {  # prompts of up to so many tokens
    "bf16": 200_000,
    "fp8": 100_000,
    "mixquant": 200_000,
    "mixquant, without quantized graphs": 200_000,
}
NEW_TOKENS = 128
CORES = 4  # on which engines are measured
FILLED = Path(tempfile.gettempdir(), f"vllm-speed-{secrets.token_hex(8)}-filled")
CROWD_TOKENS = 4096


@torch.no_grad()
def fill(tensor: torch.Tensor, *_: float, **__: str) -> None:
    """Random weights that keep the size of what they multiply; norms' are 1."""
    if tensor.is_meta or not tensor.is_floating_point():
        return
    if tensor.ndim < 2:
        tensor.fill_(1)
        return
    generator = torch.Generator(tensor.device).manual_seed(tensor.numel())
    for piece in tensor.flatten(0, -2).split(4096):
        random = torch.randn(piece.shape, generator=generator, device=tensor.device)
        piece.copy_(random * tensor.shape[-1] ** -0.5)
    FILLED.touch()


def quickest_cores(count: int) -> set[int]:
    """The cores of this host that run Python in the least time just now."""
    cores = os.sched_getaffinity(0)

    def took(core: int) -> float:
        os.sched_setaffinity(0, {core})
        start = time.perf_counter()
        sum(range(1_000_000))
        return time.perf_counter() - start

    found = sorted(cores, key=took)[:count]
    os.sched_setaffinity(0, cores)
    return set(found)


def bind(cores: set[int]) -> None:
    """Has all threads of this process and of its children run on these cores."""
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            for thread in process.threads():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, cores)


def settle(cores: set[int], seconds: int = 30) -> None:
    """Waits, but no longer than this, until these cores have had next to nothing to do for 3 s."""
    quiet, deadline = 0, time.monotonic() + seconds
    while quiet < 3 and time.monotonic() < deadline:
        busy = psutil.cpu_percent(1, percpu=True)
        quiet = quiet + 1 if max(busy[core] for core in cores) < 10 else 0


def measure(arm: str, options: argparse.Namespace) -> None:
    """Writes one arm's figures and breakdowns, measured in this process, to ``options.one_arm``."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader import dummy_loader, weight_utils

    # The engine's process is forked from this one.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    for module in (dummy_loader, weight_utils):
        module.initialize_single_dummy_weight = fill
    traces = Path(tempfile.mkdtemp(prefix="traces-"))
    profiler = {
        "profiler": "torch",
        "torch_profiler_dir": str(traces),
        "torch_profiler_with_stack": False,
    }

    most = max([*options.lengths, *options.breakdown, 8192])
    if options.turns:
        most = options.cached[-1] + NEW[-1]
    llm = LLM(
        options.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=most + 512,
        max_num_batched_tokens=8192,
        max_num_seqs=256 if options.turns else 64,
        enable_prefix_caching=options.turns,
        gpu_memory_utilization=0.25,  # only compared with what the weights need and what is free
        # vLLM cannot measure it while others start.
        kv_cache_memory_bytes=options.kv_cache * 10**9,
        disable_log_stats=True,
        profiler_config=profiler if options.breakdown else None,
        **ARMS[arm],
    )
    if not FILLED.exists():
        sys.exit("this vLLM fills weights in another way, or its engine's process was not forked")
    FILLED.unlink()
    lock = FileLock(options.lock)  # released as the process ends

    def take_turns(name: str) -> None:
        """Waits until all engines have come so far, and then until it is this one's turn."""
        lock.release()
        options.lock.with_name(f"{name}-{os.getpid()}").touch()
        deadline = time.monotonic() + 300
        while len(list(options.lock.parent.glob(f"{name}-*"))) < options.together:
            if time.monotonic() > deadline:
                sys.exit(f"another engine has not come to {name!r} in 300 s")
            time.sleep(0.1)
        lock.acquire()

    take_turns("started")  # others that still start would be measured, too
    cores = {int(core) for core in options.cores.split(",")}
    bind(cores)
    settle(cores)
    generator = random.Random(0)

    def prompts(count: int, tokens: int) -> list[dict[str, list[int]]]:
        vocabulary = (
            range(1000, 100_000) if options.vocabulary is None else range(options.vocabulary)
        )
        return [{"prompt_token_ids": generator.choices(vocabulary, k=tokens)} for _ in range(count)]

    def seconds(count: int, tokens: int, new: int) -> float:
        batch = prompts(count, tokens)
        sampling = SamplingParams(
            temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        llm.generate(batch, sampling, use_tqdm=False)
        return time.perf_counter() - start

    def mean_ttft(count: int, tokens: int) -> float:
        """Of requests that arrive together, in seconds."""
        engine = llm.llm_engine
        sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        for number, prompt in enumerate(prompts(count, tokens)):
            engine.add_request(f"{start}-{number}", prompt, sampling)
        first = []
        while engine.has_unfinished_requests():
            outputs = engine.step()
            first += [time.perf_counter() - start for output in outputs if output.finished]
        return statistics.mean(first)

    rows: list[dict[str, Any]] = []
    pieces: list[dict[str, Any]] = []

    def record(
        metric: str,
        tokens: int,
        concurrency: int,
        values: list[float],
        unit: str,
        workload: str = "batch",
        cached: int | None = None,
    ) -> None:
        row = {
            "arm": arm,
            "metric": metric,
            "workload": workload,
            "tokens": tokens,
            **({} if cached is None else {"cached": cached}),
            "concurrency": concurrency,
            "value": round(statistics.median(values), 3),
            "unit": unit,
            "lowest": round(min(values), 3),
            "highest": round(max(values), 3),
        }
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        keep()

    def keep() -> None:
        """A run may be cut off: what is measured by then is on the disk."""
        whole = options.one_arm.with_suffix(".part")
        whole.write_text(json.dumps({"results": rows, "breakdown": pieces}))
        whole.replace(options.one_arm)

    def turn(prefix: list[int], new: int) -> float:
        (prompt,) = prompts(1, new)
        prompt["prompt_token_ids"] = prefix + prompt["prompt_token_ids"]
        sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate([prompt], sampling, use_tqdm=False)
        return time.perf_counter() - start

    def quantized_share(run: Callable[[], Any]) -> float | None:
        """The share of the prompt tokens that are quantized meanwhile; None without mixquant."""
        counters = getattr(llm.llm_engine.vllm_config.quant_config, "counters", None)
        if counters is None:
            return None
        before = Counters(counters).rows()
        run()
        rows = {name: count - before[name] for name, count in Counters(counters).rows().items()}
        quantized, precise = (rows["prefill", precision] for precision in ("quantized", "precise"))
        return quantized / (quantized + precise)

    def profile(tokens: int, run: Callable[[], Any], cached: int | None = None) -> None:
        run()
        llm.start_profile()
        run()
        llm.stop_profile()
        (file,) = traces.glob("*.pt.trace.json*")
        trace = trace_of(file)
        calls = [float(count_launches(trace))]
        record(
            "launches", tokens, 1, calls, "calls", "turns" if options.turns else "length", cached
        )
        found = events(trace)
        behind = "" if cached is None else f" behind {cached}"
        print(f"{arm}, {tokens} tokens{behind}", *longest(found), sep="\n", file=sys.stderr)
        for kind, ms in by_kind(found).items():
            if not options.turns:  # a piece does not say behind how many tokens
                pieces.append({"arm": arm, "tokens": tokens, "kind": kind, "ms": round(ms, 3)})
            print(f"{kind}: {ms:.2f} ms", file=sys.stderr, flush=True)
        keep()
        if options.traces:
            name = f"{arm}-{tokens}{behind}.json.gz".replace(" ", "-").replace(",", "")
            file.rename(options.traces / name)
        else:
            file.unlink()

    if options.turns:
        for cached in options.cached:
            prefix = prompts(1, cached)[0]["prompt_token_ids"] if cached else []
            turn(prefix, 16)
            values: dict[int, list[float]] = {new: [] for new in NEW}
            for number in range(ROUNDS_OF_TURNS):
                take_turns(f"round-{number}-behind-{cached}")
                for new, of_new in values.items():
                    if new > 1024 and number % 3:
                        continue
                    turn(prefix, new)
                    count = 1 if new >= 4096 else 3 if new > 1024 else 2 if new > 512 else 6
                    of_new += [1e3 * turn(prefix, new) for _ in range(count)]
            for new, of_new in values.items():
                record("ttft", new, 1, of_new, "ms", "turns", cached)
                share = quantized_share(lambda prefix=prefix, new=new: turn(prefix, new))  # type: ignore[misc]
                if share is not None:
                    record("quantized", new, 1, [share], "share", "turns", cached)
            for new in options.breakdown:
                profile(new, lambda prefix=prefix, new=new: turn(prefix, new), cached)  # type: ignore[misc]
        return
    for tokens in options.lengths:
        repeats = 1 if tokens > 100_000 else max(2, min(11, 90_000 // tokens))
        if tokens < 30_000:  # longer ones do what shorter ones did before, chunk by chunk
            seconds(1, tokens, 1)
        of_length = [1e3 * seconds(1, tokens, 1) for _ in range(repeats)]
        record("ttft", tokens, 1, of_length, "ms", "length")
    steps: dict[int, list[float]] = {1: [], 32: []}
    for number in range(ROUNDS if options.lengths else 0):
        take_turns(f"decode-{number}")
        for batch, of_batch in steps.items():
            first = seconds(batch, 128, 1)
            of_batch += [
                1e3 * (seconds(batch, 128, NEW_TOKENS + 1) - first) / NEW_TOKENS for _ in range(2)
            ]
    for batch, of_batch in steps.items():
        if of_batch:
            record("tpot", 128, batch, of_batch, "ms")
    take_turns("the rest")
    if options.lengths:
        seconds(16, 6000, 64)
        record("batch_of_16", 6000, 16, [seconds(16, 6000, 64) for _ in range(2)], "s")
    for concurrency in options.concurrencies:
        means = [1e3 * mean_ttft(concurrency, CROWD_TOKENS) for _ in range(2)]
        record("ttft", CROWD_TOKENS, concurrency, means, "ms", "concurrency")
    for tokens in options.breakdown:
        if tokens <= PROFILED.get(arm, 0):
            profile(tokens, lambda tokens=tokens: seconds(1, tokens, 1))  # type: ignore[misc]


def tables(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: turns by new and cached tokens, and everything else."""
    rows = [row for row in rows if row["unit"] != "share"]
    turns = [row for row in rows if (row["workload"], row["metric"]) == ("turns", "ttft")]
    others = [row for row in rows if row not in turns]
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in turns) if arm != "bf16"]
    found = [turns_of(arm, turns) for arm in arms]
    return "\n\n".join([*found, *([table(others)] if others else [])])


def turns_of(arm: str, rows: list[dict[str, Any]]) -> str:
    """TTFT of turns in ms, BF16's and an arm's, and the ratio."""
    values = {(row["arm"], row["tokens"], row["cached"]): row["value"] for row in rows}
    cached = sorted({row["cached"] for row in rows})
    lines = [f"| new tokens: bf16 / {arm} (ms) | "]
    lines[0] += " | ".join(f"{count} cached" for count in cached) + " |"
    lines.append("| --- " * (1 + len(cached)) + "|")

    def cell(new: int, count: int) -> str:
        bf16, ours = (values.get((name, new, count)) for name in ("bf16", arm))
        return f"{bf16:.1f} / {ours:.1f} = {bf16 / ours:.2f}" if bf16 and ours else "-"

    for new in sorted({row["tokens"] for row in rows}):
        lines.append(f"| {new} | " + " | ".join(cell(new, count) for count in cached) + " |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """A line per measurement, a column per arm, and ratios to BF16."""
    arms = sorted(dict.fromkeys(row["arm"] for row in rows), key=list(ARMS).index)
    lines = [
        "| measurement | " + " | ".join(arms) + " | " + " | ".join(f"bf16 / {a}" for a in arms[1:])
    ]
    lines[0] += " |"
    lines.append("| --- " * (2 * len(arms)) + "|")

    def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(
            row.get(name) for name in ("metric", "tokens", "cached", "concurrency", "unit")
        )

    for key in dict.fromkeys(map(key_of, rows)):
        metric, tokens, cached, concurrency, unit = key
        values = {row["arm"]: row["value"] for row in rows if key_of(row) == key}
        behind = "" if cached is None else f" behind {cached}"
        name = f"{metric}, {concurrency} x {tokens} tokens{behind} ({unit})"
        cells = [f"{values[a]:.2f}" if a in values else "-" for a in arms]
        base = values.get("bf16")
        cells += [f"{base / values[a]:.2f}" if base and a in values else "-" for a in arms[1:]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a directory with a config.json")
    parser.add_argument(
        "--show", metavar="FILE", type=Path, help="print the table of a --json file"
    )
    parser.add_argument("--arms", default="; ".join(ARMS), help="separated by '; '")
    parser.add_argument(
        "--lengths",
        default="2048,8192,32768,131072",
        help="of the TTFT prompts; '' to profile alone",
    )
    parser.add_argument("--concurrencies", default="1,8,32", help=f"of {CROWD_TOKENS} tokens each")
    parser.add_argument(
        "--breakdown",
        help="profile prompts, or turns, of these lengths; 8192,131072, and no turns, by default",
    )
    parser.add_argument("--traces", metavar="FOLDER", type=Path, help="keep the profiles' traces")
    parser.add_argument("--turns", action="store_true", help="measure an agent's turns instead")
    parser.add_argument("--cached", default="0,8192,32768,98304", help="tokens before each turn")
    parser.add_argument(
        "--kv-cache",
        type=int,
        default=20,
        metavar="GB",
        help="of each engine; 147 kB a token",
    )
    parser.add_argument("--vocabulary", type=int, help="tokens are drawn below this number")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--together", type=int, default=1, help="engines that start at a time")
    parser.add_argument("--one-arm", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lock", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cores", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.show:
        print(tables(json.loads(options.show.read_text())["results"]))
        return
    if options.breakdown is None:
        options.breakdown = "" if options.turns else "8192,131072"
    if not options.model:
        parser.error("--model is needed, a directory with a config.json")
    lists = ("lengths", "concurrencies", "breakdown", "cached")
    numbers = {name: getattr(options, name) for name in lists}
    for name, text in numbers.items():
        setattr(options, name, [int(number) for number in text.split(",") if number])

    if options.traces:
        options.traces.mkdir(parents=True, exist_ok=True)
    if options.one_arm:
        measure(options.arms, options)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended before all was measured"))

    rows: list[dict[str, Any]] = []
    pieces: list[dict[str, Any]] = []
    arms = options.arms.split("; ")
    cores = ",".join(map(str, sorted(quickest_cores(CORES))))
    for first in range(0, len(arms), options.together):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            processes: list[tuple[str, subprocess.Popen[bytes], Path]] = []
            group = arms[first : first + options.together]
            for arm in group:
                result = Path(folder, f"{len(processes)}.json")
                command = [sys.executable, __file__, "--model", options.model, "--arms", arm]
                command += [f"--{name}={text}" for name, text in numbers.items()]
                command += ["--one-arm", str(result), "--lock", str(Path(folder, "lock"))]
                command += ["--turns"] * options.turns
                command += ["--kv-cache", str(options.kv_cache), "--cores", cores]
                command += ["--together", str(len(group))]
                if options.traces:
                    command += ["--traces", str(options.traces)]
                if options.vocabulary:
                    command += ["--vocabulary", str(options.vocabulary)]
                process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
                processes.append((arm, process, result))
            try:
                wait_for([(arm, process) for arm, process, _ in processes])
            finally:
                for _, process, _ in processes:
                    process.kill()
                for result in (one for _, _, one in processes if one.exists()):
                    measured = json.loads(result.read_text())
                    rows += measured["results"]
                    pieces += measured["breakdown"]
                if options.json and rows:
                    options.json.write_text(to_json(run_of(options, rows, pieces)))
            took = time.perf_counter() - started
            print(f"{'; '.join(group)}: {took:.0f} s", file=sys.stderr, flush=True)
    print(tables(rows))


def wait_for(processes: list[tuple[str, subprocess.Popen[bytes]]]) -> None:
    """Returns when all arms are measured; ends the program if one fails."""
    while any(process.poll() is None for _, process in processes):
        for arm, process in processes:
            if process.returncode:
                sys.exit(f"{arm}: ended with {process.returncode}")
        time.sleep(0.5)


def run_of(
    options: argparse.Namespace, rows: list[dict[str, Any]], pieces: list[dict[str, Any]]
) -> Bench:
    """What has been measured so far, as a results file has it."""
    return Bench(
        environment=Environment.here(),
        command=command_line(options.json, options.traces),
        model=options.model,
        arms=tuple(
            Arm(name=name, arguments=arguments(ARMS[name]))
            for name in dict.fromkeys(row["arm"] for row in rows)
        ),
        results=tuple(Measurement.model_validate(row) for row in rows),
        breakdown=tuple(Piece.model_validate(piece) for piece in pieces),
    )


def arguments(options: dict[str, Any]) -> str:
    """What `vllm serve` would be given for the same."""
    words = []
    for name, value in options.items():
        words += ["--" + name.replace("_", "-")]
        words += [value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


if __name__ == "__main__":
    main()
