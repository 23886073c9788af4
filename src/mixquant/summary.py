"""What an engine did to each layer of a model, as data and as a table."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from mixquant.recipe import Recipe


@dataclass(frozen=True)
class Layer:
    """One linear layer, or part of a fused one."""

    name: str  # full dotted name
    shape: tuple[int, ...]  # (out_features, in_features); one more in front for experts
    format: str  # of its quantized rows; bf16 if it has none
    kernel: str  # what multiplies them
    native: bool
    nbytes: int  # extra memory, in bytes
    why_precise: str | None  # for bf16


@dataclass(frozen=True)
class Summary:
    """The linear layers of a model, and the recipe with everything decided."""

    recipe: Recipe
    layers: tuple[Layer, ...]

    @property
    def extra_bytes(self) -> int:
        """Memory of the quantized copies, in bytes; the BF16 weights are not copied."""
        return sum(layer.nbytes for layer in self.layers)

    def table(self) -> Table:
        """One line for each projection and format."""
        recipe = self.recipe
        rule = (
            "every row of both phases is quantized"
            if recipe.everywhere
            else f"precise: the first {recipe.precise_head} and last {recipe.precise_tail} tokens "
            f"of a prompt, passes with fewer than {recipe.min_prefill_tokens} quantizable tokens, "
            "every generated token"
        )
        table = Table(
            caption=rule,
            caption_justify="left",
        )
        for heading in ("projection", "layers", "prefill", "kernel", "extra MiB", "note"):
            right = heading in ("layers", "extra MiB")
            table.add_column(heading, justify="right" if right else "left")
        groups: dict[tuple[str, str, str, bool, str], list[Layer]] = {}
        for layer in self.layers:
            projection = layer.name.rpartition(".")[2]
            note = layer.why_precise or ""
            key = (projection, layer.format, layer.kernel, layer.native, note)
            groups.setdefault(key, []).append(layer)
        for (projection, name, kernel, native, note), members in groups.items():
            extra = sum(layer.nbytes for layer in members)
            table.add_row(
                projection,
                str(len(members)),
                name,
                kernel if native or name == "bf16" else f"{kernel} (slow)",
                f"{extra / 2**20:.1f}" if extra else "-",
                note,
            )
        table.add_section()
        table.add_row("", str(len(self.layers)), "", "", f"{self.extra_bytes / 2**20:.1f}", "")
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110).print(self.table())
        return text.getvalue()


IGNORED = "named by the recipe's ignore"
