"""What an engine did to each layer of a model, as data and as a table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from mixquant.core.recipe import Recipe


@dataclass(frozen=True)
class Layer:
    """One linear layer, or part of a fused one."""

    name: str  # full dotted name
    shape: tuple[int, ...]  # (out_features, in_features); one more in front for experts
    format: str  # of its quantized rows; bf16 if it has none
    kernel: str  # what multiplies them
    native: bool
    nbytes: int  # of the quantized copy
    why_precise: str | None  # for bf16
    freed: int = 0  # bytes of BF16 weight that were given back


@dataclass(frozen=True)
class Summary:
    """The linear layers of a model, and the recipe with everything decided."""

    recipe: Recipe
    layers: tuple[Layer, ...]
    patches: tuple[str, ...] = ()  # what was changed in the model, and in how many places

    @property
    def extra_bytes(self) -> int:
        """Memory beyond the model's own in BF16, in bytes; negative if BF16 weights were given back."""
        return sum(layer.nbytes - layer.freed for layer in self.layers)

    def why_nothing(self) -> str | None:
        """Why no layer is quantized although the recipe asks for it, or None."""
        formats = self.recipe.format
        asked = set(formats.values()) if isinstance(formats, dict) else {formats}
        if asked == {"bf16"} or any(layer.format != "bf16" for layer in self.layers):
            return None
        reasons = dict.fromkeys(layer.why_precise for layer in self.layers if layer.why_precise)
        return f"no layer of this model is quantized: {'; '.join(reasons) or 'it has none'}"

    def table(self) -> Table:
        """One line for each projection and format."""
        recipe = self.recipe
        gave_back = any(layer.freed for layer in self.layers)
        rule = (
            "a prefill engine: every row is quantized, no BF16 weight of these layers is kept"
            if gave_back
            else "every row of both phases is quantized"
            if recipe.everywhere
            else f"precise: the first {recipe.precise_head} and last {recipe.precise_tail} tokens "
            f"of a prompt, passes with fewer than {recipe.min_prefill_tokens} quantizable tokens, "
            "every generated token"
        )
        rule = "\n".join((rule, *self.patches))
        table = Table(
            caption=rule,
            caption_justify="left",
        )
        sizes = ("copy MiB", "freed MiB") if gave_back else ("extra MiB",)
        for heading in ("projection", "layers", "prefill", "kernel", *sizes, "note"):
            right = heading in ("layers", *sizes)
            table.add_column(heading, justify="right" if right else "left")
        groups: dict[tuple[str, str, str, bool, str], list[Layer]] = {}
        for layer in self.layers:
            projection = layer.name.rpartition(".")[2]
            note = layer.why_precise or ""
            key = (projection, layer.format, layer.kernel, layer.native, note)
            groups.setdefault(key, []).append(layer)
        for (projection, name, kernel, native, note), members in groups.items():
            table.add_row(
                projection,
                str(len(members)),
                name,
                kernel if native or name == "bf16" else f"{kernel} (slow)",
                *_mebibytes(members, gave_back),
                note,
            )
        table.add_section()
        table.add_row("", str(len(self.layers)), "", "", *_mebibytes(self.layers, gave_back), "")
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110).print(self.table())
        return text.getvalue()


def _mebibytes(layers: Sequence[Layer], gave_back: bool) -> list[str]:
    sizes = [sum(layer.nbytes for layer in layers)]
    if gave_back:
        sizes.append(sum(layer.freed for layer in layers))
    return [f"{size / 2**20:.1f}" if size else "-" for size in sizes]


# Why a layer is precise that could be quantized.
IGNORED = "named by the recipe's ignore"
THE_RECIPE = "the recipe"
