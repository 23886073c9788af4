"""Benchmarks in a real vLLM server with mixquant: SmolLM2, whose scores are low; what runs is real."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_engines import ON_GPU, require_vllm

from mixquant import Recipe, cli, results
from mixquant.arms import Arm, running
from mixquant.evaluate.plan import on_cpu

require_vllm()
pytest.importorskip("bfcl_eval")
pytest.importorskip("openai")
pytestmark = pytest.mark.skipif(ON_GPU, reason="expects what a CPU serves with the default recipe")

CONTEXT = 8192
# SmolLM2's own does not show tools. All of their schemas would be too much for its context.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nYou can call functions.{% for tool in tools %}\n"
    "{{ tool.function.name }}: {{ tool.function.description }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content or '' }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def server(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    arguments = ["--max-model-len", str(CONTEXT), "--enforce-eager"]
    arguments += ["--chat-template", str(template)]
    arguments += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    arm = on_cpu(Arm("mixquant", Recipe(), tuple(arguments)), CONTEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        with running(arm, smollm2_path, name="smollm2", log=folder / "log") as url:
            yield url


def metric(server: str, name: str, *labels: str) -> float:
    """The sum of a counter's samples that have all of these labels, written as on the page."""
    with urllib.request.urlopen(f"{server}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith(name) and all(label in line for label in labels)
    )


def evaluate(server: str, out: Path, smollm2_path: str, *arguments: object) -> results.Evaluation:
    asking = [smollm2_path, "--served-name=smollm2", f"--url=mixquant={server}", f"--out={out}"]
    asking += ["--no-thinking", "--max-tokens=64", "--concurrency=4"]
    assert cli.main(["evaluate", *asking, *map(str, arguments)]) == 0
    read = results.read(out / "results.json")
    assert isinstance(read, results.Evaluation)
    return read


def test_bfcl(server: str, tmp_path: Path, smollm2_path: str) -> None:
    quantized = ("mixquant_rows_total", 'phase="prefill"', 'precision="quantized"')
    before = metric(server, *quantized)
    asking = ["--benchmark=bfcl-v4", "--limit=12"]
    read = evaluate(server, tmp_path, smollm2_path, *asking)
    (score,) = read.scores
    assert (score.items, score.seeds, score.failed, score.unjudged) == (12, 1, 0, 0)
    assert len(read.subscores) == 12  # each item of another category
    assert metric(server, *quantized) > before

    lines = [json.loads(line) for line in (tmp_path / "bfcl-v4" / "mixquant.jsonl").open()]
    assert len({line["item"] for line in lines[1:]}) == len(lines) - 1 == 12
    assert all(line["usage"]["completion_tokens"] > 0 for line in lines[1:])
    asked = metric(server, "vllm:request_success_total")
    assert evaluate(server, tmp_path, smollm2_path, *asking).scores == read.scores
    assert metric(server, "vllm:request_success_total") == asked


def test_prompts_are_cut_to_what_the_server_takes(
    server: str, tmp_path: Path, smollm2_path: str
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
    before = metric(server, "vllm:prompt_tokens_total")
    read = evaluate(
        server, tmp_path / "out", smollm2_path, "--benchmark=longbench-v2", f"--data={data}"
    )
    (score,) = read.scores
    assert (score.items, score.failed) == (1, 0)
    asked = (metric(server, "vllm:prompt_tokens_total") - before) / score.seeds
    assert CONTEXT / 2 < asked <= CONTEXT - 64
