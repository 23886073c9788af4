"""How far recipes are from BF16 at several prompt lengths, and what they win back.

    python benchmarks/recipes_by_length.py --text FILE --text FILE [--lengths 1024,4096] --json FILE
    python benchmarks/recipes_by_length.py --show FILE

The figures are those of `mixquant fidelity`: KL over the whole vocabulary and top-1 at each token of the
texts' own continuations. Here the continuation is read in one pass with the prompt, its rows precise,
and no arm writes an answer of its own. A prompt of 8,192 tokens then takes a quarter of the time.
*Recovered* is the share won back of the KL of NVFP4 in both phases, the first arm. All arms attend in
BF16, as recipes of `mixquant tune` do, and formats that are not native are emulated. What the JSON file
holds already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from command_line import command_line
from transformers.utils import logging

from mixquant.checkpoints.models import find, load_model, load_tokenizer
from mixquant.core.recipe import Recipe
from mixquant.engines.transformers import prepare
from mixquant.evaluate.divergence import divergence
from mixquant.evaluate.fidelity.passages import Passages, check_lengths, cut
from mixquant.results import Environment
from mixquant.tune import measure

ANSWER = 96  # tokens
BOTH = "nvfp4 in both phases"
ARMS: dict[str, dict[str, Any]] = {
    BOTH: {"preset": "fast", "format": "nvfp4", "everywhere": True},
    "fast nvfp4": {"preset": "fast", "format": "nvfp4"},
    # What `balanced` is on Blackwell, whose FP8 is native.
    "balanced nvfp4": {"format": {"default": "nvfp4", "k_proj": "fp8", "v_proj": "fp8"}},
    "fp8": {"format": "fp8"},
    "int8": {"format": "int8"},
}


def arms(tuned: list[str], recipes: list[str]) -> dict[str, Recipe]:
    """The arms by name.

    Args:
        tuned: NAME=FILE each, a results file of `mixquant tune`.
        recipes: NAME=RECIPE each.
    """
    found = {name: Recipe.from_dict(values) for name, values in ARMS.items()}
    for one in tuned:
        name, _, file = one.partition("=")
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        recipe = next(arm["recipe"] for arm in values["arms"] if arm["name"] == "tuned")
        found[name] = Recipe.from_dict(recipe)
    for one in recipes:
        name, _, source = one.partition("=")
        found[name] = Recipe.load(source)
    settings = {"min_prefill_tokens": 0, "prefill_attention": "bf16"}
    return {name: Recipe.from_dict({**one.to_dict(), **settings}) for name, one in found.items()}


def answers(checkpoint: Any, recipe: Recipe | None, passages: Passages) -> measure.Logits:
    """The logits of an arm; None: BF16."""
    model = load_model(checkpoint, torch.bfloat16)
    if recipe is not None:
        prepare(model, recipe)
    everywhere = recipe is not None and recipe.everywhere
    found = measure.logits(model, passages, everywhere)
    del model
    measure.free()
    return found


def figures(reference: measure.Logits, own: measure.Logits) -> dict[str, list[float]]:
    """Of each text."""
    pairs = [divergence(wanted, one) for wanted, one in zip(reference, own, strict=True)]
    return {
        "kl": [kl.mean().item() for kl, _ in pairs],
        "top1": [agrees.double().mean().item() for _, agrees in pairs],
    }


def table(found: dict[str, Any]) -> str:
    """KL, top-1 and recovered by arm and length."""
    rows = {(one["arm"], one["prompt_tokens"]): one for one in found["rows"]}
    lengths = sorted({tokens for _, tokens in rows})

    def cell(arm: str, tokens: int) -> str:
        if (arm, tokens) not in rows:
            return "-"
        one, both = rows[arm, tokens], rows[BOTH, tokens]
        recovered = 1 - fmean(one["kl"]) / fmean(both["kl"])
        return f"{fmean(one['kl']):.4f}, {fmean(one['top1']):.1%}, {recovered:.1%}"

    lines = [f"| KL, top-1, recovered | {' | '.join(f'{one:,} tokens' for one in lengths)} |"]
    lines.append("| --- " * (1 + len(lengths)) + "|")
    for arm in dict.fromkeys(arm for arm, _ in rows):
        lines.append(f"| {arm} | {' | '.join(cell(arm, one) for one in lengths)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", action="append", default=[], help="a file; may be repeated")
    parser.add_argument("--lengths", default="1024,2048,4096", help="of prompts, in tokens")
    parser.add_argument(
        "--tuned", action="append", default=[], help="NAME=FILE of mixquant tune; may be repeated"
    )
    parser.add_argument(
        "--recipe", action="append", default=[], help="NAME=RECIPE; may be repeated"
    )
    parser.add_argument("--only", default="", help="arms to measure now, separated by commas")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a --json file's table")
    options = parser.parse_args()
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return
    logging.disable_progress_bar()
    lengths = [int(one) for one in options.lengths.split(",")]
    checkpoint = find(options.model)
    check_lengths(checkpoint, lengths, ANSWER)
    texts = {Path(file).name: Path(file).read_text(encoding="utf-8") for file in options.text}
    chosen = arms(options.tuned, options.recipe)
    found: dict[str, Any] = {"rows": []}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
    found = {
        "command": command_line(options.json),
        "environment": json.loads(Environment.here().model_dump_json()),
        "recipes": {name: recipe.to_dict() for name, recipe in chosen.items()},
        "rows": found["rows"],
    }
    for passages in cut(texts, load_tokenizer(checkpoint), lengths, ANSWER):
        tokens = passages.prompt_tokens
        known = {one["arm"] for one in found["rows"] if one["prompt_tokens"] == tokens}
        wanted = set(options.only.split(",")) if options.only else chosen.keys()
        missing = {name: chosen[name] for name in chosen if name in wanted - known}
        if not missing:
            continue
        reference = answers(checkpoint, None, passages)
        for name, recipe in missing.items():
            begin = time.monotonic()
            own = answers(checkpoint, recipe, passages)
            row = {"arm": name, "prompt_tokens": tokens, "texts": list(texts)}
            found["rows"].append({**row, **figures(reference, own)})
            said = f"{time.monotonic() - begin:.0f} s, {time.process_time():.0f} of the CPU so far"
            print(json.dumps(found["rows"][-1]), said, file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.json:  # with the command of the last call, which named every arm
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
