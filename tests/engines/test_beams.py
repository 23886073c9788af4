"""Beam search: the rows of an answer are precise, though vLLM submits them as a prompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import this_machine
import tiny_models
from transformers import AutoTokenizer
from vllm_engines import require_vllm, rows_of

from mixquant.engines.vllm.patches import beams

require_vllm()

PROMPTS = (60, 41)  # tokens
STEPS = 4
SCRIPT = """
import json, sys
model, recipe, prompts, steps = json.loads(sys.argv[1])

def main():
    from vllm.sampling_params import BeamSearchParams
    options = dict(model=model, quantization="mixquant", additional_config={"mixquant": recipe},
                   max_model_len=512, enforce_eager=True, enable_prefix_caching=False)
    from vllm import LLM
    llm = LLM(**options)
    params = BeamSearchParams(beam_width=2, max_tokens=steps, ignore_eos=True)
    tokens = [{"prompt_token_ids": list(range(10, 10 + count))} for count in prompts]
    for output in llm.beam_search(tokens, params):
        print("tokens", len(output.sequences[0].tokens))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_rows_of_beams_are_precise(smollm2_path: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    tokenizer.save_pretrained(model)
    changes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    changes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    tiny_models.build("llama", **changes).bfloat16().save_pretrained(model)
    recipe = {**this_machine.RECIPE, "min_prefill_tokens": 0, "precise_tail": 1}
    trace = tmp_path / "trace"
    given = json.dumps([str(model), recipe, PROMPTS, STEPS])
    script = tmp_path / "beams.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), given],
        env={
            **os.environ,
            "MIXQUANT_TRACE": str(trace),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.count(f"tokens {PROMPTS[0] + STEPS}") == 1
    rows = [row for line in trace.read_text().splitlines() for row in rows_of(json.loads(line))]
    assert {prompt for _, _, prompt, _ in rows} == set(PROMPTS)
    for _, position, prompt, quantized in rows:
        assert quantized == (position < prompt - 1)
    # Each step computed prompt and answer so far again: the first one for one beam, others for two.
    assert sum(position == 0 for _, position, _, _ in rows) == 2 + 2 * 2 * (STEPS - 1)
    answers = sum(position >= prompt for _, position, prompt, _ in rows)
    assert answers == 2 * 2 * sum(range(STEPS))


def test_every_way_to_beam_search_makes_its_prompts_where_we_look() -> None:
    """Offline and over HTTP: both from the class that is wrapped, through what is wrapped."""
    from vllm.v1.engine.input_processor import InputProcessor

    beams.install()
    beams.install()  # changes nothing
    sequence = next(
        sys.modules[name].BeamSearchSequence for name in beams._MODULES if name in sys.modules
    )
    prompt = {"type": "token", "prompt_token_ids": [1, 2, 3], "prompt": None}
    made = sequence(orig_prompt=prompt, tokens=[1, 2, 3, 4, 5], logprobs=[]).get_prompt()
    assert made["prompt_token_ids"] == [1, 2, 3, 4, 5]
    assert made[beams.KEY] == 3
    assert hasattr(InputProcessor.process_inputs, "__wrapped__")
    assert not hasattr(InputProcessor.process_inputs.__wrapped__, "__wrapped__")
