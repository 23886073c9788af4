"""Measure a recipe of your own against a preset: how far from BF16, at what cost.

    python examples/measure_recipe.py smollm2

`mixquant fidelity` runs the model in BF16 and with each recipe on the same texts. KL is the distance
from BF16's distribution, in nats per token: smaller is better. Bits is the mean size of a multiplied
weight in prefill: smaller is cheaper.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from mixquant import Recipe, cli
from mixquant.results import Fidelity, read

# FP8 everywhere, but for the projections that write the KV cache.
OWN = Recipe(format={"default": "fp8", "k_proj": "bf16", "v_proj": "bf16"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a recipe of your own with a preset.")
    parser.add_argument("model", help="a directory, a Hugging Face hub name, or smollm2")
    parser.add_argument("--recipe", metavar="JSON", help="instead of the one in this file")
    parser.add_argument("--against", default="fast", help="a preset (default: fast)")
    given, options = parser.parse_known_args()  # other options go to `mixquant fidelity`
    own = OWN if given.recipe is None else Recipe.load(given.recipe)

    with tempfile.TemporaryDirectory() as folder:
        recipe, results = Path(folder) / "own.json", Path(folder) / "results.json"
        recipe.write_text(own.to_json())
        command = ["fidelity", given.model, "--json", str(results)]
        command += ["--recipe", str(recipe), "--recipe", given.against]
        if code := cli.main([*command, *options]):  # as on the command line
            sys.exit(code)
        measured = read(results)
    assert isinstance(measured, Fidelity)

    bits = {cost.arm: cost.bits for cost in measured.costs}
    for result in measured.results:
        print(
            f"{result.arm} at {result.prompt_tokens} prompt tokens: KL {result.kl_mean:.4f}, "
            f"top-1 {result.top1:.1%}, {bits[result.arm]:.1f} bits"
        )


if __name__ == "__main__":
    main()
