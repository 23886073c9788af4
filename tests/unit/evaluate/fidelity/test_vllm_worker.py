"""What a worker of vLLM takes down of a pass, on stand-ins for its runner."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file


def test_what_a_worker_takes_down_with_the_v2_runner(tmp_path: Path) -> None:
    """vLLM has it on GPUs only. A prompt of 10 in pieces of 8 and 2, then three answer tokens."""
    pytest.importorskip("vllm", reason="the recorder asks vLLM for its rank")
    from mixquant.evaluate.fidelity.vllm_worker import Recorder

    class Runner:
        def __init__(self) -> None:
            self.model: Any = torch.nn.Linear(4, 6)
            self.model.compute_logits = lambda hidden: hidden  # type: ignore[assignment]
            prompts = np.array([0, 10])
            self.req_states = SimpleNamespace(prompt_len=SimpleNamespace(np=prompts))

        def get_model(self) -> Any:
            return self.model

        def prepare_inputs(self, scheduler_output: Any, description: Any) -> Any:
            first, count = scheduler_output
            return SimpleNamespace(
                num_reqs=1,
                req_ids=["a"],
                idx_mapping_np=np.array([1]),
                num_computed_tokens_np=np.array([first]),
                num_scheduled_tokens=np.array([count]),
            )

    runner, worker = Runner(), Recorder()
    worker.model_runner = runner
    passes = [(0, 8), (8, 2), (10, 1), (11, 1)]
    logits = torch.randn(4, 1, 6)
    written = []
    worker.mixquant_record([5, 0, 3])
    for one, its in zip(passes, logits, strict=True):
        assert runner.prepare_inputs(one, None).num_reqs == 1
        written.append(runner.model.compute_logits(its).argmax().item())
    monkey = pytest.MonkeyPatch()
    monkey.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda: 0)
    worker.mixquant_recorded(str(tmp_path / "0.safetensors"))
    monkey.undo()
    assert written == [logits[0].argmax().item(), 5, 0, 3]
    assert torch.equal(load_file(tmp_path / "0.safetensors")["logits"], logits[1:, 0])
    # Afterwards the model answers by itself.
    runner.prepare_inputs((10, 1), None)
    assert torch.equal(runner.model.compute_logits(logits[2]), logits[2])
