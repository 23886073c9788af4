"""A prefill and a decode engine on a GPU each, against one engine that does both: TTFT, TPOT, transfers.

    python benchmarks/disaggregated.py --model DIRECTORY --json FILE

DIRECTORY holds a config.json and a tokenizer; weights are random. Both are started by `mixquant serve`
and loaded over HTTP by vLLM's generator, as `mixquant bench` does, one while the other idles: the set
on GPUs 0 and 1, the colocated engine on GPU 0. With the recipe `fast`, prefix caches off. "transfer"
is what the decode engine says of NIXL (seconds and bytes of each request's KV cache).
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from command_line import command_line

from mixquant.bench.counts import read_counts
from mixquant.bench.generator import Generator, generator
from mixquant.bench.summary import measurements
from mixquant.bench.workloads import LoadPoint, Plan, points
from mixquant.checkpoints import models
from mixquant.results import Arm, Bench, Environment, Measurement, to_json
from mixquant.servers.ports import free_ports

ENGINE = ["--load-format", "dummy", "--no-enable-prefix-caching", "--max-num-seqs", "64"]
COLOCATED, SET = "colocated", "prefill and decode apart"
OPTIONS = {
    COLOCATED: [],
    SET: ["--prefill", "1", "--decode", "1", "--prefill-gpus", "0", "--decode-gpus", "1"],
}
NIXL = {"seconds": "vllm:nixl_xfer_time_seconds", "bytes": "vllm:nixl_bytes_transferred"}


class Server:
    """A server that starts; its address, and when it serves that of the engine that decodes."""

    def __init__(self, name: str, process: Any, url: str, log: Path) -> None:
        self.name, self.process, self.url, self.log = name, process, url, log
        self.decoder = url

    def wait(self) -> None:
        path = "/ready" if self.name == SET else "/health"
        while True:
            if self.process.poll() is not None:
                sys.exit(f"{self.name} ended:\n{self.log.read_text()[-3000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url + path, timeout=5):
                break
            time.sleep(1)
        for child in psutil.Process(self.process.pid).children(recursive=True):
            line = child.cmdline()
            if any('"role":"decode"' in word for word in line):
                self.decoder = f"http://127.0.0.1:{line[line.index('--port') + 1]}"


@contextlib.contextmanager
def starting(name: str, options: argparse.Namespace, logs: Path) -> Iterator[Server]:
    (port,) = free_ports(1)
    own = [*ENGINE, "--max-model-len", str(max(options.lengths) + 512)]
    own += ["--kv-cache-memory-bytes", str(options.kv_cache_bytes)]
    own += ["--gpu-memory-utilization", "0.6"]  # only compared with what is free
    command = [sys.executable, "-m", "mixquant.cli", "serve", options.model, "--recipe", "fast"]
    command += ["--served-model-name", "model", "--port", str(port), "--logs", str(logs / name)]
    with (logs / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *OPTIONS[name], "--", *own], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield Server(name, process, f"http://127.0.0.1:{port}", logs / f"{name}.log")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def nixl(url: str) -> dict[str, tuple[float, float]]:
    """Sum and number of each of NIXL's figures so far; zeros where there are none."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as page:
        lines = [line.rsplit(" ", 1) for line in page.read().decode().splitlines() if " " in line]

    def of(name: str) -> float:
        return sum(float(value) for key, value in lines if key.partition("{")[0] == name)

    return {key: (of(f"{name}_sum"), of(f"{name}_count")) for key, name in NIXL.items()}


def measure(
    server: Server, load: Generator, asked: list[LoadPoint], repeats: int
) -> list[Measurement]:
    found: list[Measurement] = []
    name, url, decoder = server.name, server.url, server.decoder
    for point in asked:
        load.send(url, "model", point.run(0), point.concurrency)
        before, sent = read_counts(decoder), nixl(decoder)
        runs = [
            load.send(url, "model", point.run(number), point.concurrency)
            for number in range(1, repeats + 1)
        ]
        found += measurements(name, point, runs, read_counts(decoder).since(before))
        for key, (total, count) in nixl(decoder).items():
            if (times := count - sent[key][1]) > 0:
                each = (total - sent[key][0]) / times
                value, unit = (1e3 * each, "ms") if key == "seconds" else (each / 1e6, "MB")
                found.append(
                    Measurement(
                        arm=name,
                        metric=f"transfer_{key}",
                        workload=point.workload,
                        tokens=point.tokens,
                        concurrency=point.concurrency,
                        value=value,
                        unit=unit,
                    )
                )
        for one in found:
            if (one.tokens, one.concurrency) == (point.tokens, point.concurrency):
                print(name, one.metric, one.tokens, one.concurrency, one.value, file=sys.stderr)
    return found


def table(rows: list[Any]) -> str:
    """As Markdown: a line per point and metric that says something here, a column per arm."""
    lines = [f"| measurement | {COLOCATED} | {SET} |", "| --- | --- | --- |"]
    wanted = ("ttft", "tpot", "output", "transfer_seconds", "transfer_bytes")
    keys = dict.fromkeys((r.tokens, r.concurrency, r.metric, r.unit) for r in rows)
    for tokens, concurrency, metric, unit in keys:
        if metric not in wanted:
            continue
        values = {
            r.arm: r.value
            for r in rows
            if (r.tokens, r.concurrency, r.metric) == (tokens, concurrency, metric)
        }
        cells = [f"{values[a]:.2f}" if a in values else "-" for a in (COLOCATED, SET)]
        lines.append(
            f"| {metric}, {concurrency} x {tokens} tokens ({unit}) | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a directory with a config.json and a tokenizer")
    parser.add_argument("--show", metavar="FILE", type=Path, help="print a --json file's table")
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--batches", default="16", help="of 2,048 tokens each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kv-cache-bytes", type=int, default=6 * 10**9)
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--logs", type=Path, help="default: a new folder")
    options = parser.parse_args()
    if options.show:
        rows = Bench.model_validate_json(options.show.read_text()).results
        print(table(list(rows)))
        return
    options.lengths = [int(number) for number in options.lengths.split(",")]
    batches = tuple(int(number) for number in options.batches.split(",") if number)
    plan = Plan(
        lengths=tuple(options.lengths),
        batches=batches,
        concurrencies=(),
        turns=(),
        cached=(),
        sessions=(),
        prompt_tokens=2048,
        output_tokens=64,
        seed=0,
    )
    asked = points(plan, models.load_tokenizer(models.find(options.model)))
    options.logs = options.logs or Path(tempfile.mkdtemp(prefix="disaggregated-"))
    options.logs.mkdir(parents=True, exist_ok=True)
    found: list[Measurement] = []
    with (
        generator(options.logs / "generator.log") as load,
        starting(SET, options, options.logs) as apart,
        starting(COLOCATED, options, options.logs) as colocated,
    ):
        apart.wait()
        colocated.wait()
        for server in (colocated, apart):
            found += measure(server, load, asked, options.repeats)
    if options.json:
        bench = Bench(
            environment=Environment.here(),
            command=command_line(options.json),
            model=Path(options.model).name,
            arms=tuple(
                Arm(name=name, arguments=shlex.join(["--recipe", "fast", *OPTIONS[name]]))
                for name in (COLOCATED, SET)
            ),
            settings={
                name: getattr(options, name)
                for name in ("lengths", "batches", "repeats", "kv_cache_bytes")
            },
            results=tuple(found),
        )
        options.json.write_text(to_json(bench))
    print(table(found))


if __name__ == "__main__":
    main()
