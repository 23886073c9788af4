"""One arm's answers from vLLM, in a process of its own.

    python -m mixquant.evaluate.fidelity.vllm_worker FOLDER

FOLDER/spec.json says what to run, see `answers_vllm`. For each prompt, in order, two files come to lie
in FOLDER: NUMBER.safetensors with the ``logits`` ``[answer tokens, V]``, then NUMBER.json. Prompts go
through the engine one at a time.

vLLM cannot be told what to write, and its custom logits processors differ between the V1 runner and the
V2 runner (which has none before 0.31). Both runners ask the model for logits, by ``compute_logits``,
once a pass and outside CUDA graphs. So that is wrapped, in the workers: the logits are taken down whole,
and in their place the runner gets ones in which the wanted token is the likeliest. The token is then
decoded like any other.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixquant.core.recipe import Recipe


class Recorder:
    """What vLLM adds to each of its workers (``worker_extension_cls``)."""

    model_runner: Any

    def mixquant_record(self, answer: list[int]) -> None:
        """Forces the next request, the only one, to write this answer, and records its logits."""
        state = self.__dict__.get("mixquant_answers")
        if state is None:
            state = self.__dict__["mixquant_answers"] = _Answer(self.model_runner)
        state.begin(answer)

    def mixquant_recorded(self, file: str) -> None:
        """Writes the recorded logits to a file, and lets requests answer by themselves again."""
        self.__dict__["mixquant_answers"].end(file)

    def mixquant_layers(self) -> list[dict[str, Any]]:
        """The linear layers of this worker's share of the model, as `Layer`s in dicts."""
        return _layers(self.model_runner.get_model())


class _Answer:
    """The answer that the runner's only request is forced to write."""

    def __init__(self, runner: Any) -> None:
        self._wanted: list[int] | None = None
        self._logits: list[Tensor] = []
        self._position = -1  # in the answer, of the token that the pass computes; negative: none
        self._follow(runner)
        model = runner.get_model()
        self._compute = model.compute_logits
        model.compute_logits = self._compute_logits

    def begin(self, answer: list[int]) -> None:
        self._wanted, self._logits = answer, []

    def end(self, file: str) -> None:
        from safetensors.torch import save_file

        logits, self._wanted, self._logits = self._logits, None, []
        if logits and self._first_rank():
            save_file({"logits": torch.stack(logits)}, file)

    def _follow(self, runner: Any) -> None:
        """Learns from the runner where in its sequence each pass ends."""
        from mixquant.engines.vllm.patches.runners import note_v1, note_v2

        name, note = ("prepare_inputs", note_v2)
        if not hasattr(runner, name):
            name, note = ("_prepare_inputs", note_v1)
        prepare = getattr(runner, name)

        def prepared(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = prepare(scheduler_output, *args, **kwargs)
            batch = note(runner, scheduler_output, inputs)
            if self._wanted is not None:
                if len(batch.requests) != 1:
                    raise RuntimeError(f"one request at a time, not {len(batch.requests)}")
                end = batch.first_positions[0] + batch.row_counts[0]
                self._position = int(end - batch.prompt_lengths[0])
            return inputs

        setattr(runner, name, prepared)

    def _compute_logits(self, *args: Any, **kwargs: Any) -> Any:
        logits = self._compute(*args, **kwargs)
        # A chunk of a prompt has logits, too, which vLLM discards. Other ranks have none.
        if self._wanted is None or logits is None or not 0 <= self._position < len(self._wanted):
            return logits
        self._logits.append(logits[0].cpu())
        forced = torch.full_like(logits, -1e4)
        forced[:, self._wanted[self._position]] = 0
        return forced

    def _first_rank(self) -> bool:
        from vllm.distributed import get_tensor_model_parallel_rank

        return bool(get_tensor_model_parallel_rank() == 0)


def _layers(model: Any) -> list[dict[str, Any]]:
    from mixquant.engines.vllm.table import summary

    modules = dict(model.named_modules())
    lines = []
    for layer in summary(model, Recipe()).layers:
        module = modules.get(layer.name)
        for shape in _shapes(module, layer.shape):
            lines.append({**asdict(layer), "shape": shape})
    return lines


def _shapes(module: Any, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of the matrices in a module that the summary has in one line, where it says so little."""
    if len(shape) == 3:  # a mixture's first product; the second one comes back from its middle
        experts, twice, hidden = shape
        return [shape, (experts, hidden, twice // 2)]
    if shape != (0, 0):
        return [shape]
    if (weight := getattr(module, "w13_weight", None)) is not None:
        return _shapes(module, tuple(weight.shape))
    # The weight itself may be packed for a kernel.
    rows = getattr(module, "output_size_per_partition", 0) or getattr(module, "output_size", 0)
    columns = getattr(module, "input_size_per_partition", 0) or getattr(module, "input_size", 0)
    return [(rows, columns)]


def main(folder: Path) -> None:
    spec = json.loads((folder / "spec.json").read_text())
    from vllm import LLM, SamplingParams

    from mixquant.engines.vllm.config import PhaseQuantizationConfig

    options = spec["options"]
    llm = LLM(**{**_given(spec["arguments"]), **options})
    method = llm.llm_engine.vllm_config.quant_config
    if not isinstance(method, PhaseQuantizationConfig):
        method = None
    about = {
        "recipe": None if method is None else method.recipe.to_dict(),
        "layers": [] if method is None else llm.collective_rpc("mixquant_layers")[0],
    }
    (folder / "about.json").write_text(json.dumps(about))
    for number, (prompt, answer) in enumerate(zip(spec["prompts"], spec["answers"], strict=True)):
        parameters = SamplingParams(
            temperature=0, max_tokens=len(answer), ignore_eos=True, detokenize=False
        )
        before = _rows(method)
        llm.collective_rpc("mixquant_record", args=(answer,))
        forced = _answer(llm, prompt, parameters)
        llm.collective_rpc("mixquant_recorded", args=(str(folder / f"{number}.safetensors"),))
        if forced != answer:
            raise RuntimeError("this version of vLLM did not write the answer it was made to write")
        quantized, precise = (
            after - until for after, until in zip(_rows(method), before, strict=True)
        )
        written = {
            "greedy": _answer(llm, prompt, parameters),
            "quantized_share": quantized / max(quantized + precise, 1),
        }
        partial = folder / f"{number}.partial"
        partial.write_text(json.dumps(written))
        partial.rename(folder / f"{number}.json")


def _answer(llm: Any, prompt: list[int], parameters: Any) -> list[int]:
    (output,) = llm.generate({"prompt_token_ids": prompt}, parameters, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def _rows(method: Any) -> tuple[int, int]:
    """How many prompt rows were quantized so far, and how many not."""
    if method is None:
        return 0, 0
    from mixquant.engines.vllm.counters import Counters

    rows = Counters(method.counters).rows()
    return rows["prefill", "quantized"], rows["prefill", "precise"]


def _given(arguments: list[str]) -> dict[str, Any]:
    """vLLM's own arguments, as its servers take them, for its class."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="--vllm-args"))
    given = EngineArgs.from_cli_args(parser.parse_args(arguments))
    return {name: value for name, value in vars(given).items() if not name.startswith("_")}


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    main(Path(sys.argv[1]))
