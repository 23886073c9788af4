"""Needles that SmolLM2 finds by recipe: the task `needle` of `mixquant evaluate`, without a server.

    python benchmarks/needle_smollm2.py [--lengths 1024,4096] [--kinds single-2] [--items 20] --json FILE
    python benchmarks/needle_smollm2.py --show FILE

Prompts and scores are the task's own. Every arm answers on Transformers, greedily, with at most 64
tokens. Arms attend in BF16, and formats that are not native are emulated. What the JSON file holds
already is not asked again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from command_line import command_line
from recipes_by_length import arms
from transformers.utils import logging

from mixquant.checkpoints.models import Checkpoint, find, load_model, load_tokenizer
from mixquant.conversation import opening
from mixquant.core.recipe import Recipe
from mixquant.engines.transformers import prepare
from mixquant.evaluate.tasks import Item, PromptLimits
from mixquant.evaluate.tasks.needle import Needle
from mixquant.results import Environment
from mixquant.tune.measure import free

KINDS = ("single-1", "single-2", "multikey-1", "multivalue")
NEW_TOKENS = 64
ARMS = ("nvfp4 in both phases", "fast nvfp4", "balanced nvfp4")


def items_of(
    checkpoint: Checkpoint, tokenizer: Any, lengths: Sequence[int], kinds: Sequence[str], items: int
) -> list[Item]:
    """The first items of each kind at each length."""
    task = Needle(lengths)

    def tokens(text: str) -> int:
        return len(opening(tokenizer, [{"role": "user", "content": text}]))

    task.limits = PromptLimits(tokens, checkpoint.context, NEW_TOKENS)
    wanted = {
        f"{length}-{kind}-{number}"
        for length in lengths
        for kind in kinds
        for number in range(items)
    }
    return [item for item in task.load(None, lambda text: text) if item.id in wanted]


def model_of(checkpoint: Checkpoint, recipe: Recipe | None) -> Any:
    """An arm's model; None: BF16. Its steps of decode attend in the fast way."""
    model = load_model(checkpoint, torch.bfloat16)
    model.set_attn_implementation("mixquant_sdpa")
    return model if recipe is None else prepare(model, recipe)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, items: Sequence[Item]) -> list[str]:
    """What the model says to items, which are read side by side, shorter prompts padded on the left."""
    prompts = [opening(tokenizer, item.messages) for item in items]
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor(
        [
            [0] * pad + prompt  # masked, so any token does
            for pad, prompt in zip(padding, prompts, strict=True)
        ],
        device=model.device,
    )
    mask = torch.arange(longest, device=model.device) >= tokens.new_tensor(padding)[:, None]
    written = model.generate(
        tokens, attention_mask=mask.long(), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    said: list[str] = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    return said


def tables(found: dict[str, Any]) -> str:
    """Scores by arm and kind of needle, and by arm and length.

    They count the items that every arm has answered.
    """
    rows = found["rows"]
    answered: dict[str, set[str]] = {}
    for one in rows:
        answered.setdefault(one["arm"], set()).add(one["item"])
    shared = set.intersection(*answered.values()) if answered else set()
    rows = [one for one in rows if one["item"] in shared]
    return "\n\n".join(table(rows, by) for by in ("kind", "length"))


def table(rows: Sequence[dict[str, Any]], by: str) -> str:
    """Mean scores by arm and `kind` or `length`, with how many items each has."""
    place = {"length": 0, "kind": 1}[by]

    def part(row: dict[str, Any]) -> str:
        return str(row["group"].split(" ")[place])

    parts = list(dict.fromkeys(map(part, rows)))
    lines = [f"| arm, by {by} | {' | '.join(parts)} | all |", "| --- " * (2 + len(parts)) + "|"]
    for arm in dict.fromkeys(one["arm"] for one in rows):
        own = [one for one in rows if one["arm"] == arm]
        scores = [[one["score"] for one in own if part(one) == name] for name in parts]
        scores.append([one["score"] for one in own])
        cells = [f"{sum(some) / len(some):.0%} of {len(some)}" for some in scores]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024", help="of prompt and answer, in tokens")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of needles")
    parser.add_argument("--items", type=int, default=20, help="of each kind and length")
    parser.add_argument("--batch", type=int, default=10, help="items that are read side by side")
    parser.add_argument(
        "--tuned", action="append", default=[], help="NAME=FILE of mixquant tune; may be repeated"
    )
    parser.add_argument("--only", default="", help="arms, separated by commas")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a --json file's tables")
    options = parser.parse_args()
    if options.show:
        print(tables(json.loads(options.show.read_text())))
        return
    logging.disable_progress_bar()
    checkpoint = find("smollm2")
    tokenizer = load_tokenizer(checkpoint)
    lengths = [int(one) for one in options.lengths.split(",")]
    every = items_of(checkpoint, tokenizer, lengths, options.kinds.split(","), options.items)
    tuned = [one.partition("=")[0] for one in options.tuned]
    recipes = arms(options.tuned, [])
    chosen = {"bf16": None, **{name: recipes[name] for name in (*ARMS, *tuned)}}
    rows: list[dict[str, Any]] = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
    known = {(one["arm"], one["item"]) for one in rows}
    score = Needle().score
    for name, recipe in chosen.items():
        missing = [item for item in every if (name, item.id) not in known]
        if not missing or (options.only and name not in options.only.split(",")):
            continue
        model = model_of(checkpoint, recipe)
        for first in range(0, len(missing), options.batch):
            some = missing[first : first + options.batch]
            begin = time.process_time()
            for item, said in zip(some, answers(model, tokenizer, some), strict=True):
                verdict = asyncio.run(score(item, {"text": said}))
                row = {"arm": name, "item": item.id, "group": item.group}
                rows.append({**row, "score": verdict.score, "answer": said})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            print(f"{time.process_time() - begin:.0f} s of the CPU", file=sys.stderr, flush=True)
            if options.json:
                found = {
                    "command": command_line(options.json),
                    "environment": json.loads(Environment.here().model_dump_json()),
                    "recipes": {one: r and r.to_dict() for one, r in chosen.items()},
                    "rows": rows,
                }
                options.json.write_text(json.dumps(found, indent=1) + "\n")
        del model
        free()
    print(tables({"rows": rows}))


if __name__ == "__main__":
    main()
