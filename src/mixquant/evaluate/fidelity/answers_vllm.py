"""Runs arms on vLLM: one engine after the other, each in a process of its own (`vllm_worker`)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from mixquant.checkpoints.models import Checkpoint
from mixquant.core.recipe import Recipe
from mixquant.core.summary import Layer
from mixquant.evaluate.fidelity.answers import Answers, ArmAnswers, EngineError, Progress
from mixquant.evaluate.fidelity.passages import Passages
from mixquant.files import scratch
from mixquant.servers.arms import terminated_like_interrupted
from mixquant.servers.process import end, reason, stands_for

WORKER_COMMAND = (sys.executable, "-m", "mixquant.evaluate.fidelity.vllm_worker")
# Options of vLLM that every arm sets.
DECIDED = (
    "--additional-config",
    "--config",
    "--dtype",
    "--enable-prefix-caching",
    "--max-model-len",
    "--model",
    "--no-enable-prefix-caching",
    "--quantization",
    "--skip-tokenizer-init",
    "--worker-extension-cls",
    "-q",
)
# Of those, the ones that an arm of the user's may set: another checkpoint, another quantization.
OF_ARMS = ("--additional-config", "--dtype", "--model", "--quantization", "-q")
_LONGEST_START = 0.3  # share of an arm's time that the progress bar gives to the start


@dataclass(frozen=True)
class VLLM:
    """Runs arms.

    Attributes:
        arguments: vLLM's own, as ``vllm serve`` takes them. Without a recipe they may name another
            checkpoint (``--model``) or quantization.
    """

    arguments: tuple[str, ...] = ()

    def __call__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe | None,
        passages: Sequence[Passages],
        progress: Progress = lambda doing, share: None,
    ) -> ArmAnswers:
        """Starts an engine, lets it answer, and ends it.

        Raises:
            EngineError: it did not start, or ended early.
        """
        prompts = [(one, text) for one in passages for text in range(len(one.prompts))]
        spec = {
            "arguments": [*self._missing(checkpoint), *self.arguments],
            "options": self._options(recipe, passages),
            "prompts": [one.prompts[text] for one, text in prompts],
            "answers": [one.continuations[text] for one, text in prompts],
        }
        folder = scratch.make("fidelity")
        (folder / "spec.json").write_text(json.dumps(spec))
        try:
            with terminated_like_interrupted(), _process(folder) as process:
                _wait(process, folder, [one.prompt_tokens for one, _ in prompts], progress)
        except BaseException:
            for large in folder.glob("*.safetensors"):
                large.unlink()  # the log stays
            scratch.keep(folder)
            raise
        about = json.loads((folder / "about.json").read_text())
        numbers = iter(range(len(prompts)))
        run = ArmAnswers(
            answers=tuple(
                _answers(folder, [next(numbers) for _ in one.prompts]) for one in passages
            ),
            recipe=about["recipe"],
            layers=tuple(
                Layer(**{**layer, "shape": tuple(layer["shape"])}) for layer in about["layers"]
            ),
            head=None,
        )
        scratch.remove(folder)
        return run

    def _missing(self, checkpoint: Checkpoint) -> list[str]:
        """The model and its type, unless the arguments name others."""
        usual = {"--model": checkpoint.source, "--dtype": "bfloat16"}
        return [
            part
            for option, value in usual.items()
            if not any(stands_for(argument, (option,)) for argument in self.arguments)
            for part in (option, value)
        ]

    def _options(self, recipe: Recipe | None, passages: Sequence[Passages]) -> dict[str, Any]:
        import torch

        longest = max(one.prompt_tokens + len(one.continuations[0]) for one in passages)
        options: dict[str, Any] = {
            "max_model_len": longest,
            # The continuation and the arm's own answer share the prompt; both have to read it.
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "worker_extension_cls": "mixquant.evaluate.fidelity.vllm_worker.Recorder",
        }
        if not torch.cuda.is_available():
            options["enforce_eager"] = True  # compilation takes longer than these few answers
        if recipe is not None:
            options["quantization"] = "mixquant"
            options["additional_config"] = {"mixquant": recipe.to_dict()}
        return options


@contextmanager
def _process(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process that runs the engine, in its own session; the block ends it with all its
    children."""
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [*WORKER_COMMAND, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process)


def _wait(
    process: subprocess.Popen[bytes], folder: Path, lengths: Sequence[int], progress: Progress
) -> None:
    """Waits until the process has ended. Raises EngineError if it ended without all answers."""
    while True:
        ended = process.poll() is not None
        written = sum(1 for number in range(len(lengths)) if _answer_file(folder, number).exists())
        if written == len(lengths):
            return
        if ended:
            log = folder / "log.txt"
            raise EngineError(f"vLLM ended: {reason(log)} (full log: {log})")
        if (folder / "about.json").exists():
            share = _LONGEST_START + (1 - _LONGEST_START) * written / len(lengths)
            progress(f"{lengths[written]} tokens", share)
        else:
            progress("starting vLLM", 0.0)
        time.sleep(0.2)


def _answer_file(folder: Path, number: int) -> Path:
    return folder / f"{number}.json"


def _answers(folder: Path, numbers: Sequence[int]) -> Answers:
    written = [json.loads(_answer_file(folder, number).read_text()) for number in numbers]
    return Answers(
        logits=tuple(load_file(folder / f"{number}.safetensors")["logits"] for number in numbers),
        greedy=tuple(tuple(one["greedy"]) for one in written),
        quantized_share=sum(one["quantized_share"] for one in written) / len(written),
    )
