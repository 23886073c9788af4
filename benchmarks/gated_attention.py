"""Which half of `q_proj` prefill in NVFP4 harms where attention's output is gated (Qwen3-Next, Qwen3.5).

    python benchmarks/gated_attention.py [--json FILE] [--steps N]
    python benchmarks/gated_attention.py --show FILE

There `q_proj` makes queries and, for each of their elements, a gate on attention's output. No trained
model of this kind is small enough, so one is trained first: bytes of Python's documentation, four
layers of gated attention (gated delta nets would take hours on a CPU). Then each arm reads prompts that
the training has not seen, formats emulated, and the divergence from BF16 of what follows is measured.
Both halves have the same number of weights, and `o_proj` has as many as one of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from command_line import command_line
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3NextConfig

from mixquant.core.recipe import STATE_WRITERS, FormatName, Recipe
from mixquant.engines.transformers import phase, prepare
from mixquant.evaluate.divergence import divergence

WIDTH, HEADS, SIZE, LAYERS = 256, 4, 64, 4
BATCH, LENGTH = 8, 192  # of training, in bytes
PROMPTS, PROMPT, ANSWER = 24, 512, 64

STATES: dict[str, FormatName] = dict.fromkeys(STATE_WRITERS, "fp8")
ARMS: dict[str, dict[str, FormatName]] = {
    "all in NVFP4": {},
    "balanced: states in FP8": STATES,
    "balanced, queries in FP8": {**STATES, "of_queries": "fp8"},
    "balanced, gates in FP8": {**STATES, "of_gates": "fp8"},
    "balanced, o_proj in FP8": {**STATES, "o_proj": "fp8"},
}


class GatedQueries(nn.Module):
    """`q_proj` as two layers, which can have different formats. It has both for each head in turn."""

    def __init__(self, q_proj: nn.Linear) -> None:
        super().__init__()
        halves = q_proj.weight.view(HEADS, 2, SIZE, WIDTH).unbind(1)
        self.of_queries, self.of_gates = (
            nn.Linear(WIDTH, HEADS * SIZE, bias=False, dtype=half.dtype) for half in halves
        )
        for layer, half in zip((self.of_queries, self.of_gates), halves, strict=True):
            layer.weight.data.copy_(half.reshape(HEADS * SIZE, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        halves = [
            layer(x).unflatten(-1, (HEADS, SIZE)) for layer in (self.of_queries, self.of_gates)
        ]
        return torch.cat(halves, -1).flatten(-2)


def trained(texts: Tensor, steps: int) -> Any:
    """A model that has read the bytes of ``texts``, in BF16."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        layer_types=["full_attention"] * LAYERS,
        mlp_only_layers=list(range(LAYERS)),
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        head_dim=SIZE,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    begin = time.monotonic()
    for step in range(steps):
        starts = torch.randint(len(texts) - LENGTH - 1, (BATCH,))
        batch = torch.stack([texts[start : start + LENGTH + 1] for start in starts])
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            said = f"step {step + 1} of {steps}: {loss.item():.3f} nats a byte"
            print(f"{said}, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    for module in model.modules():
        if isinstance(getattr(module, "q_proj", None), nn.Linear):
            module.q_proj = GatedQueries(module.q_proj)
    return model.to(torch.bfloat16).eval()


@torch.no_grad()
def logits_of(model: Any, texts: Tensor) -> Tensor:
    """What follows prompts: the logits ``[answers' tokens, 256]``. Only the prompts are quantized."""
    with phase("prefill"):
        output = model(input_ids=texts[:, :PROMPT], use_cache=True, logits_to_keep=1)
    found = [output.logits[:, -1]]
    for position in range(PROMPT, texts.shape[1] - 1):
        output = model(
            input_ids=texts[:, position : position + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        found.append(output.logits[:, -1])
    return torch.stack(found, 1).flatten(0, 1).float()


def measured(model: Any, texts: Tensor, formats: Mapping[str, FormatName]) -> dict[str, float]:
    """Divergence of an arm, with prefill alone quantized and with both phases."""
    expected = logits_of(model, texts)
    found = {}
    for name, everywhere in (("prefill", False), ("both", True)):
        arm = copy.deepcopy(model)
        recipe = Recipe(
            format={"default": "nvfp4", **formats},
            min_prefill_tokens=0,
            everywhere=everywhere,
            emulate=True,
            prefill_attention="bf16",  # what is measured is products
        )
        prepare(arm, recipe)
        kl, _ = divergence(expected, logits_of(arm, texts))
        found[f"kl_{name}"] = kl.mean().item()
        per_text = kl.view(len(texts), -1).mean(1)
        found[f"error_{name}"] = (per_text.std() / len(texts) ** 0.5).item()
    return found


def table(found: dict[str, Any]) -> str:
    """The divergences, and how sure they are."""
    lines = ["| arm | KL, prefill alone | KL, both phases |", "| --- " * 3 + "|"]
    for row in found["rows"]:
        cells = [f"{row[f'kl_{of}']:.4f} ± {row[f'error_{of}']:.4f}" for of in ("prefill", "both")]
        lines.append(f"| {row['arm']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="of the training")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a --json file's table")
    options = parser.parse_args()
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return
    every = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    held_out = len(every) // 10
    model = trained(every[:-held_out], options.steps)
    torch.manual_seed(1)
    whole = PROMPT + ANSWER + 1
    starts = torch.randint(held_out - whole, (PROMPTS,)) + len(every) - held_out
    texts = torch.stack([every[start : start + whole] for start in starts])
    rows = []
    for arm, formats in ARMS.items():
        rows.append({"arm": arm, **measured(model, texts, formats)})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    found = {"command": command_line(options.json), "steps": options.steps, "rows": rows}
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
