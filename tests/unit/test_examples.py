"""The examples run: on tiny models, against a stub of a server, and as a dry run."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chat_stub
import pytest
import tiny_models
from paths import REPOSITORY

from mixquant import cli

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokens are bytes."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    tiny_models.build("llama", max_position_embeddings=2048).save_pretrained(directory)
    return directory


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs an example as ``python FILE ARGUMENTS`` would, in this process, which is faster."""

    def run(name: str, *arguments: str | Path) -> None:
        file = str(EXAMPLES / name)
        monkeypatch.setattr(sys, "argv", [file, *map(str, arguments)])
        runpy.run_path(file, run_name="__main__")

    return run


def module(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def tool_call(name: str, number: int = 0, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"tool_calls": [{"id": f"call-{number}", "type": "function", "function": function}]}


def test_all_of_them_are_tested_and_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    tests = Path(__file__).read_text()
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")}
    assert len(files) == 4
    for name in files:
        assert f"[{name}]({name})" in listed
        assert name.partition(".")[0] in tests


# --- agent_loop.py -----------------------------------------------------------------------------------


def test_the_agent_answers_by_what_its_tools_said(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lists, reads, and answers; each request carries the ones before."""
    pytest.importorskip("openai")
    (tmp_path / "note.txt").write_text("the word is heron")
    steps = [
        tool_call("list_files", 1, pattern="*"),
        tool_call("read_file", 2, path="note.txt"),
        {"content": "It is heron."},
    ]
    with chat_stub.serving(chat_stub.Stub(lambda body: steps[len(stub.asked) - 1])) as stub:
        run("agent_loop.py", "Which word?", "--folder", tmp_path, "--url", f"{stub.url}/v1")
    printed = capsys.readouterr()
    assert printed.out == "It is heron.\n"
    assert 'read_file({"path": "note.txt"})' in printed.err
    assert "turn 3: 7 new prompt tokens behind 0 cached ones, 3 written" in printed.err
    first, second, third = (body["messages"] for body in stub.asked)
    assert [message["role"] for message in first] == ["system", "user"]
    assert second[: len(first)] == first and third[: len(second)] == second
    assert second[-1] == {"role": "tool", "tool_call_id": "call-1", "content": "note.txt"}
    assert third[-1] == {"role": "tool", "tool_call_id": "call-2", "content": "the word is heron"}
    assert {one["function"]["name"] for one in stub.asked[0]["tools"]} == {
        "list_files",
        "read_file",
    }


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("read_file", '{"path": "missing"}', "No such file"),
        ("read_file", '{"path": "../secret"}', "outside the folder"),
        ("read_file", '{"path": "/etc/passwd"}', "outside the folder"),
        ("read_file", '{"path": "link"}', "outside the folder"),
        ("read_file", '{"file": "x"}', "unexpected keyword"),
        ("read_file", "{", "error: "),
        ("read_file", "[]", "error: "),
        ("list_files", '{"pattern": "/*"}', "error: "),
        ("remove", "{}", "no tool 'remove'"),
    ],
)
def test_a_wrong_tool_call_is_told_to_the_model(
    tmp_path: Path, name: str, arguments: str, says: str
) -> None:
    pytest.importorskip("openai")
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    result = module("agent_loop").call(folder, name, arguments)
    assert result.startswith("error: ") and says in result


def test_files_outside_the_folder_are_not_listed(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").write_text("m")
    agent = module("agent_loop")
    assert agent.list_files(folder, "*") == "mine"
    assert agent.list_files(folder, "../*") == "no file matches"


def test_an_agent_that_never_answers_ends(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    again = tool_call("list_files", pattern="*")
    with chat_stub.serving(chat_stub.Stub(lambda body: again)) as stub:
        client = openai.OpenAI(base_url=f"{stub.url}/v1", api_key="none")
        with pytest.raises(RuntimeError, match="no answer after 3 turns"):
            module("agent_loop").run(client, "stub", tmp_path, "?", turns=3)
    assert len(stub.asked) == 3


# --- the others --------------------------------------------------------------------------------------


def test_transformers_generate(
    run: Callable[..., None], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text"
    file.write_text("a long text. " * 20)
    recipe = '{"format": "fp8"}'  # whose emulation compiles nothing
    options = ("--recipe", recipe, "--max-new-tokens", "4")
    run("transformers_generate.py", tiny, file, "Why?", *options)
    summary, _, answer = capsys.readouterr().out.rpartition("\n\n")
    assert "q_proj" in summary and "fp8" in summary
    assert answer.strip()


def test_measure_recipe(
    run: Callable[..., None], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe that is given has a distance from BF16; the preset that quantizes nothing has none."""
    options = ["--length", "200", "--answer-tokens", "8", "--texts", "1", "--no-quantized"]
    recipe = '{"format": {"default": "fp8", "down_proj": "bf16"}}'
    run("measure_recipe.py", tiny, "--recipe", recipe, "--against", "exact", *options)
    lines = [one for one in capsys.readouterr().out.splitlines() if " prompt tokens: KL " in one]
    measured = {line.split()[0]: line for line in lines}
    assert set(measured) == {"bf16", "own", "exact"}
    assert measured["bf16"].endswith("at 200 prompt tokens: KL 0.0000, top-1 100.0%, 16.0 bits")
    assert measured["exact"].endswith("at 200 prompt tokens: KL 0.0000, top-1 100.0%, 16.0 bits")
    assert float(measured["own"].split("KL ")[1].split(",")[0]) > 0
    assert 8 < float(measured["own"].split()[-2]) < 16


def test_measure_recipe_ends_as_the_command_does(
    run: Callable[..., None], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("measure_recipe.py", tiny, "--length", "0")
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1


def test_set_two_gpus(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a dry run, on a machine that says it has two GPUs."""
    pytest.importorskip("yaml")
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho '0, GPU-a, 81559'\necho '1, GPU-b, 81559'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    file = str(EXAMPLES / "set_two_gpus.yaml")
    assert cli.main(["serve", str(tiny), "--config", file, "--dry-run"]) == 0
    processes = capsys.readouterr().out.split("\n\n")
    prefill, decode, front = (
        next(text for text in processes if text.lstrip().startswith(f"# {name}:"))
        for name in ("prefill-0", "decode-0", "front")
    )
    assert "CUDA_VISIBLE_DEVICES=0 " in prefill and "CUDA_VISIBLE_DEVICES=1 " in decode
    assert '"role":"prefill"' in prefill and '"role":"decode"' in decode
    assert '"preset":"fast"' in prefill
    assert "--max-model-len 32768" in prefill and "--max-model-len 32768" in decode
    assert "--max-num-seqs 256" in decode and "--max-num-seqs" not in prefill
    assert "--inner 127.0.0.1:9090" in front


def test_set_two_gpus_in_containers(capsys: pytest.CaptureFixture[str]) -> None:
    """The file as it stands: nothing of this machine, nor the model, is looked at."""
    yaml = pytest.importorskip("yaml")
    file = str(EXAMPLES / "set_two_gpus.yaml")
    assert cli.main(["serve", "--config", file, "--render", "compose"]) == 0
    services = yaml.safe_load(capsys.readouterr().out)["services"]
    assert {"prefill-0", "decode-0", "front"} <= set(services)
