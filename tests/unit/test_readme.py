"""README: its numbers are those of the committed results, its code runs, its links lead somewhere."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from paths import REPOSITORY, RESULTS

from mixquant.core.recipe import LEAST_ON_CPU, LEAST_ON_GPU, LEAST_WITHOUT_GRAPHS
from mixquant.engines.vllm import graphs
from mixquant.kernels.cpu import compiled
from mixquant.results import Comparison, read

README = REPOSITORY / "README.md"
WHOLE_PROMPTS = "attention_speed_h100.json"
ROWS = {
    "time to first token, 2,048 tokens": ("ttft", 2048, 1),
    "time to first token, 4,096 tokens": ("ttft", 4096, 1),
    "time to first token, 8,192 tokens": ("ttft", 8192, 1),
    "time to first token, 32,768 tokens": ("ttft", 32768, 1),
    "time to first token, 131,072 tokens": ("ttft", 131072, 1),
    "time to first token, 8 prompts of 4,096 at once": ("ttft", 4096, 8),
    "16 prompts of 6,000 tokens, total time": ("batch_of_16", 6000, 16),
    "time per output token, 1 sequence": ("tpot", 128, 1),
    "time per output token, 32 sequences": ("tpot", 128, 32),
}


def text() -> str:
    return README.read_text(encoding="utf-8")


def results(name: str) -> dict[str, Any]:
    values = json.loads((RESULTS / name).read_text())
    assert isinstance(values, dict)
    return values


def speed_up(name: str, arm: str, metric: str, tokens: int, concurrency: int) -> float:
    """Of an arm, against BF16 in the same run."""
    bf16, of_arm = (
        next(
            one["value"]
            for one in results(name)["results"]
            if (one["arm"], one["metric"], one["tokens"], one["concurrency"])
            == (wanted, metric, tokens, concurrency)
        )
        for wanted in ("bf16", arm)
    )
    return float(bf16 / of_arm)


def tables_after(heading: str) -> list[list[list[str]]]:
    """The cells of each table of a section, without its head."""
    section = text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    tables: list[list[list[str]]] = []
    for before, line in pairwise(section.splitlines()):
        if line.startswith("|"):
            if not before.startswith("|"):
                tables.append([])
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return [table[2:] for table in tables]


def turns() -> dict[tuple[int, int], float]:
    """How many times as fast as BF16, by new and cached tokens."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for one in results("turns_h100.json")["results"]:
        if one["metric"] != "ttft":
            continue
        found.setdefault((one["tokens"], one["cached"]), {})[one["arm"]] = one["value"]
    return {turn: of["bf16"] / of["mixquant"] for turn, of in found.items()}


def test_it_is_short() -> None:
    assert len(text().splitlines()) <= 150


def test_the_table_of_turns_holds_the_committed_results() -> None:
    rows = tables_after("Results")[0]
    cached = (0, 8192, 32768, 98304)
    shown = {
        (int(new.replace(",", "")), behind): cell
        for new, *cells in rows
        for behind, cell in zip(cached, cells, strict=True)
    }
    assert shown == {
        turn: f"**{ratio:.2f}**" if round(ratio, 2) < 1 else f"{ratio:.2f}"
        for turn, ratio in turns().items()
    }


def test_the_table_holds_the_committed_results() -> None:
    rows = tables_after("Results")[1]
    assert [name for name, *_ in rows] == list(ROWS)
    for name, *cells in rows:
        fp8, ours = (float(cell.strip("*")) for cell in cells)
        assert cells[0] == f"{speed_up(WHOLE_PROMPTS, 'fp8', *ROWS[name]):.2f}", name
        assert cells[1].strip("*") == f"{speed_up(WHOLE_PROMPTS, 'mixquant', *ROWS[name]):.2f}", (
            name
        )
        # Where it loses is bold, and nothing else is.
        assert cells[1].startswith("**") == (ours < max(1, fp8)), name


def test_the_table_says_what_was_run() -> None:
    section = text().split("\n## Results\n")[1].split("\n## ")[0]
    for name in (WHOLE_PROMPTS, "turns_h100.json"):
        environment = results(name)["environment"]
        assert environment["device"].startswith("NVIDIA H100 80GB")
        assert f"vLLM {environment['versions']['vllm']}" in section


def test_other_numbers_are_committed_results() -> None:
    readme = " ".join(text().split())
    kl = {arm["name"]: arm["kl_mean"] for arm in results("compare_cpu_epyc.json")["arms"]}
    assert f"is {kl['mixquant']:.3f} nats per token, against {kl['quantized']:.3f}" in readme
    for name, shown in (
        ("compare_cpu_amx.json", "{:.2f} times, SmolLM2-135M, Transformers, torch 2.11"),
        ("compare_cpu_epyc.json", "{:.2f} times, SmolLM2-135M, Transformers"),
    ):
        rate = {arm["name"]: arm["prefill_tokens_per_s"] for arm in results(name)["arms"]}
        assert shown.format(rate["mixquant"] / rate["bf16"]) in readme
    # The extremes of the gain on Hopper are those of the table.
    gains = [
        float(row[2].strip("*")) for row in tables_after("Results")[1] if "first token" in row[0]
    ]
    assert f"{min(gains):.2f} to {max(gains):.2f} times" in readme
    decode = [speed_up(WHOLE_PROMPTS, "mixquant", "tpot", 128, sequences) for sequences in (1, 32)]
    assert f"it was up to {round(100 * (1 / min(decode) - 1))} % slower" in readme
    precise, _ = graphs.sizes([512], LEAST_ON_GPU, 8192)
    assert (
        f"Up to {max(precise)} new tokens are read in BF16 on a GPU ({LEAST_WITHOUT_GRAPHS - 1:,} "
        f"where vLLM captures no quantized graphs; {LEAST_ON_CPU - 1} on a CPU)" in readme
    )
    fp8 = [speed_up(WHOLE_PROMPTS, "fp8", "tpot", 128, sequences) for sequences in (1, 32)]
    assert f"decode {min(fp8):.1f} to {max(fp8):.1f} times (H100)" in readme


def test_the_demo_is_what_the_command_prints_of_a_committed_run() -> None:
    from rich.console import Console

    from mixquant.cli.tables.compare import table

    result = read(RESULTS / "compare_cpu_epyc.json")
    assert isinstance(result, Comparison)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(result))
    printed = [line.rstrip() for line in captured.get().splitlines()]
    (shown,) = re.findall(r"```\n(smollm2: .*?)```", text(), flags=re.DOTALL)
    lines = shown.splitlines()
    assert lines == printed[: len(lines)]
    assert lines[-1].lstrip().startswith("mixquant")


def test_results_on_a_gpu_come_before_the_demo() -> None:
    headings = re.findall(r"^## (.*)", text(), flags=re.MULTILINE)
    wanted = ["When not to use it", "Results", "Serve", "Try it without a GPU", "Transformers"]
    places = [headings.index(one) for one in wanted]
    assert all(a < b for a, b in pairwise(places))


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", text())
    assert len(links) > 15
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)", text(), flags=re.MULTILINE)
    }
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        assert not path or (REPOSITORY / path).exists(), link
        assert path or anchor in headings, link


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling the quantizer takes most of a minute, and is tested elsewhere.
    monkeypatch.setattr(compiled, "_failure", "not in this test")
    tiny_models.build("llama").save_pretrained(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", text(), flags=re.DOTALL)
    inputs = {"input_ids": tiny_models.tokens(150), "max_new_tokens": 3}
    values: dict[str, Any] = {"path": tmp_path, "inputs": inputs}
    exec(code, values)
    assert values["mixquant"].summary(values["model"]).layers
    assert len([line for line in code.splitlines() if line.strip()]) == 5


def test_its_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", text(), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
