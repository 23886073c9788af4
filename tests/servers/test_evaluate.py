"""Benchmarks in a real vLLM server with mixquant: SmolLM2, whose scores are low; what runs is real."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from served import Served
from vllm_engines import ON_GPU, require_vllm

from mixquant import cli, results

require_vllm()
pytest.importorskip("bfcl_eval")
pytest.importorskip("openai")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ON_GPU, reason="expects what a CPU serves with the default recipe"),
]


@pytest.fixture(autouse=True)
def key(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", served.key)


def metric(served: Served, name: str, *labels: str) -> float:
    """The sum of a counter's samples that have all of these labels, written as on the page."""
    with urllib.request.urlopen(f"{served.url}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith(name) and all(label in line for label in labels)
    )


def evaluate(
    served: Served, out: Path, smollm2_path: str, *arguments: object
) -> results.Evaluation:
    asking = [smollm2_path, f"--served-name={served.name}", f"--out={out}"]
    asking += [f"--url=mixquant={served.url}"]
    asking += ["--no-thinking", "--max-tokens=16", "--concurrency=4"]
    assert cli.main(["evaluate", *asking, *map(str, arguments)]) == 0
    read = results.read(out / "results.json")
    assert isinstance(read, results.Evaluation)
    return read


def test_bfcl(served: Served, tmp_path: Path, smollm2_path: str) -> None:
    quantized = ("mixquant_rows_total", 'phase="prefill"', 'precision="quantized"')
    before = metric(served, *quantized)
    asking = ["--benchmark=bfcl-v4", "--limit=12"]
    read = evaluate(served, tmp_path, smollm2_path, *asking)
    (score,) = read.scores
    assert (score.items, score.seeds, score.failed, score.unjudged) == (12, 1, 0, 0)
    assert len(read.subscores) == 12  # each item of another category
    assert metric(served, *quantized) > before

    lines = [json.loads(line) for line in (tmp_path / "bfcl-v4" / "mixquant.jsonl").open()]
    assert len({line["item"] for line in lines[1:]}) == len(lines) - 1 == 12
    assert all(line["usage"]["completion_tokens"] > 0 for line in lines[1:])
    asked = metric(served, "vllm:request_success_total")
    assert evaluate(served, tmp_path, smollm2_path, *asking).scores == read.scores
    assert metric(served, "vllm:request_success_total") == asked


def test_prompts_are_cut_to_what_the_server_takes(
    served: Served, tmp_path: Path, smollm2_path: str
) -> None:
    question = {
        "_id": "one",
        "domain": "Long",
        "sub_domain": "text",
        "difficulty": "easy",
        "length": "long",
        "question": "Which is it?",
        **{f"choice_{letter}": f"the {letter}th" for letter in "ABCD"},
        "answer": "A",
        "context": " ".join(f"{number}: Größe 🙂 {number**3:x}." for number in range(4000)),
    }
    data = tmp_path / "data.json"
    data.write_text(json.dumps([question]))
    before = metric(served, "vllm:prompt_tokens_total")
    read = evaluate(
        served, tmp_path / "out", smollm2_path, "--benchmark=longbench-v2", f"--data={data}"
    )
    (score,) = read.scores
    assert (score.items, score.failed) == (1, 0)
    asked = (metric(served, "vllm:prompt_tokens_total") - before) / score.seeds
    assert served.context / 2 < asked <= served.context - 16


def test_needles(served: Served, tmp_path: Path, smollm2_path: str) -> None:
    before = metric(served, "vllm:prompt_tokens_total")
    read = evaluate(
        served,
        tmp_path,
        smollm2_path,
        "--benchmark=needle",
        "--length=512",
        "--limit=8",
        "--max-tokens=64",  # the last one counts
    )
    (score,) = read.scores
    assert (score.items, score.failed) == (8, 0)
    assert len(read.subscores) == 8  # each kind once; the only length is the whole
    # 512 tokens with the answer; the template that this server has is shorter than SmolLM2's.
    asked = (metric(served, "vllm:prompt_tokens_total") - before) / score.items
    assert score.prompt_tokens == asked
    assert 512 - 128 - 80 < asked <= 512 - 128
