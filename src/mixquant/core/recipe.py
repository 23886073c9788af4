"""What the user chooses: formats, thresholds, and the layers that stay BF16."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mixquant.core.layer_names import FUSED_PROJECTIONS, STATE_WRITERS, matches
from mixquant.errors import MixquantError
from mixquant.files.reading import ReadingError, parse_json, shown

FormatName = Literal["nvfp4", "fp8", "int8", "bf16"]
PresetName = Literal["fast", "balanced", "exact"]
RoleName = Literal["both", "prefill", "decode"]

# More than any context holds; engines count in 32 bits.
Tokens = Annotated[int, Field(ge=0, lt=2**31, strict=True)]

FORMATS: tuple[FormatName, ...] = ("nvfp4", "fp8", "int8", "bf16")
PRESETS: tuple[PresetName, ...] = ("fast", "balanced", "exact")

_PRECISE_HEAD: dict[str, int] = {"nvfp4": 4, "fp8": 0, "int8": 0, "bf16": 0}


class RecipeError(MixquantError, ValueError):
    """A recipe that cannot be used. The message is one line and names the offending key."""


LEAST_ON_GPU = 704
"""The fewest quantizable tokens with which a pass gains on a GPU that replays quantized CUDA graphs.

With fewer, reading the BF16 weights for the pass's precise rows takes as long as the products gain:
`benchmarks/linear_crossover.py`.
"""

LEAST_WITHOUT_GRAPHS = 2048
"""The same without graphs: launching a quantized pass takes the CPU longer than a precise one."""

LEAST_ON_CPU = 128


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Recipe:
    """How a model is run: which rows and layers are quantized, and to what.

    Attributes:
        preset: what ``format``, if it is a single name, means for each projection. ``fast``: every
            projection has that format. ``balanced``: the same, but under nvfp4 the projections that
            write the KV cache or the recurrent state have fp8 where it is native, and bf16 elsewhere.
            ``exact``: nothing is quantized.
        format: ``nvfp4``, ``fp8``, ``int8``, ``bf16``; ``auto`` (the fastest that the device
            multiplies natively); or a mapping from projection names or glob patterns to formats,
            with ``default`` for the rest. A mapping is used as written, whatever the preset.
        min_prefill_tokens: a pass with fewer quantizable rows is all precise. A small product is
            bound by reading its weights (on an H200, 690 TFLOP/s over 4 TB/s: below some 170 rows),
            and a pass with a precise tail reads the BF16 weights in any case. None: `LEAST_ON_GPU`,
            `LEAST_WITHOUT_GRAPHS` or `LEAST_ON_CPU`.
        precise_head: tokens at the start of a prompt that stay precise. None: by format.
        precise_tail: tokens at the end of a prompt that stay precise.
        block_scale: how NVFP4 picks block scales: ``6`` (the block's largest value becomes 6, the
            largest code) or ``4/6`` (6 or 4 for each block, whichever errs less; arXiv 2512.02010).
        ignore: names or glob patterns of layers that stay BF16.
        emulate: serve formats that the device does not multiply natively, slower than BF16. The vLLM
            engine refuses such formats otherwise. The Transformers engine always emulates them.
        prefill_attention: what quantized rows attend in, over the BF16 KV cache. ``fp8``: FP8, where
            vLLM runs on a GPU that has it (Hopper, with the package fa3-fwd). ``int8``: INT8, where
            Transformers runs on a CPU with AVX-512 VNNI. ``bf16``: BF16. ``auto``: what is
            fastest, unless nothing is quantized. BF16 replaces a precision that is not available.
        everywhere: quantize every row of both phases, whatever the thresholds. For comparisons.
        prefill_model: a checkpoint in NVFP4 or FP8 (compressed-tensors) from which the quantized copy is
            taken. ``format`` is then the checkpoint's. If it is a mapping, a layer has the more precise
            of the two formats, and is made from the BF16 weights where the checkpoint has another one.
            None makes the whole copy from the BF16 weights.
        role: what a vLLM engine of a disaggregated set is for. ``prefill``: it holds quantized layers
            in their format alone, without BF16 weights, so every row is quantized, whatever the
            thresholds. ``decode``: nothing is quantized, whatever the format, so that one
            recipe serves both. ``both``: one engine does both phases.

    Raises:
        pydantic.ValidationError: (a ValueError) a value of the wrong type or range. The
            constructors from text raise `RecipeError` instead.
    """

    preset: PresetName = "balanced"
    format: FormatName | Literal["auto"] | dict[str, FormatName] = "auto"
    min_prefill_tokens: Tokens | None = None
    precise_head: Tokens | None = None
    precise_tail: Tokens = 1
    block_scale: Literal["6", "4/6"] = "6"
    ignore: tuple[str, ...] = ("lm_head",)
    emulate: Annotated[bool, Field(strict=True)] = False
    prefill_attention: Literal["auto", "bf16", "fp8", "int8"] = "auto"
    everywhere: Annotated[bool, Field(strict=True)] = False
    prefill_model: Annotated[str, Field(min_length=1, strict=True)] | None = None
    role: RoleName = "both"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe with these values; absent keys take their defaults.

        Raises:
            RecipeError: an unknown key, or a value of the wrong type or range.
        """
        if not isinstance(values, Mapping):
            raise RecipeError(
                f"a recipe is a JSON object with the keys {_known_keys()}, not {shown(values)}"
            )
        unknown = [key for key in values if key not in {f.name for f in fields(cls)}]
        if unknown:
            raise RecipeError(
                f"unknown recipe key {shown(unknown[0])}; the keys of a recipe are {_known_keys()}"
            )
        if isinstance(values.get("format"), str) and values["format"] not in (*FORMATS, "auto"):
            raise RecipeError(
                f"unknown format {shown(values['format'])}; "
                f"expected auto, {', '.join(FORMATS)}, or a mapping from projections to formats"
            )
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"][:1])
            raise RecipeError(
                f"recipe key {where!r}: {first['msg']}, got {shown(values.get(where))}"
            ) from None

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that a JSON object describes.

        Raises:
            RecipeError: no JSON, not that of a recipe, or a key that appears twice.
        """
        try:
            values = parse_json(text)
        except ReadingError as error:
            raise RecipeError(f"the recipe is not JSON: {error}") from None
        return cls.from_dict(values)

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """The recipe that a preset's name, a JSON text, or the path of a JSON file stands for.

        Raises:
            RecipeError: none of these, or a file that cannot be read.
        """
        text = str(source)
        if text in PRESETS:
            return cls.from_dict({"preset": text})
        if text.lstrip().startswith("{"):
            return cls.from_json(text)
        path = Path(text)
        try:
            found = path.is_file()
        except OSError:  # too long for a name
            found = False
        if not found:
            raise RecipeError(
                f"unknown recipe {text[:100]!r}: expected a preset ({', '.join(PRESETS)}), "
                "a JSON object, or the path of a JSON file"
            )
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read the recipe {text}: {error}") from None
        except RecipeError as error:
            raise RecipeError(f"{text}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON types; `from_dict` takes it back."""
        return {**asdict(self), "ignore": list(self.ignore)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def resolved(self, native: frozenset[str], on_gpu: bool = False) -> Recipe:
        """This recipe with everything decided, for a device that multiplies ``native`` formats.

        In the result ``format`` is a mapping with a ``default`` and no threshold is None; for the
        role ``prefill`` all thresholds are 0. Resolving a second time changes nothing.

        Raises:
            RecipeError: a mapping of formats without a ``default``.
        """
        if self.preset == "exact" or self.role == "decode":
            by_projection: dict[str, FormatName] = {"default": "bf16"}
        elif isinstance(self.format, dict):
            if "default" not in self.format:
                raise RecipeError(
                    "recipe key 'format': a mapping needs 'default', the format of the other layers"
                )
            by_projection = dict(self.format)
        else:
            name = fastest(native) if self.format == "auto" else self.format
            by_projection = {"default": name}
            if self.preset == "balanced" and name == "nvfp4":
                milder: FormatName = "fp8" if "fp8" in native else "bf16"
                by_projection |= dict.fromkeys(STATE_WRITERS, milder)
        if self.role == "prefill":
            return replace(
                self, format=by_projection, min_prefill_tokens=0, precise_head=0, precise_tail=0
            )
        used = by_projection.values()
        head, least = self.precise_head, self.min_prefill_tokens
        if least is None:
            least = LEAST_ON_GPU if on_gpu else LEAST_ON_CPU
        return replace(
            self,
            format=by_projection,
            min_prefill_tokens=least,
            precise_head=max(_PRECISE_HEAD[f] for f in used) if head is None else head,
            prefill_model=None if self.role == "decode" else self.prefill_model,
        )

    def settings_without_effect(self, resolved: Recipe) -> list[str]:
        """What this recipe says that changes nothing in ``resolved``, a sentence for each key."""
        assert isinstance(resolved.format, dict), "resolve the recipe first"
        used = set(resolved.format.values())
        found = []
        if self.preset == "exact":
            asked = self.format if isinstance(self.format, dict) else {"": self.format}
            if not set(asked.values()) <= {"auto", "bf16"}:
                found.append("recipe key 'format' changes nothing: preset exact quantizes nothing")
            if self.everywhere:
                found.append(
                    "recipe key 'everywhere' changes nothing: preset exact quantizes nothing"
                )
        if self.block_scale != "6" and "nvfp4" not in used and self.role != "decode":
            found.append(
                f"recipe key 'block_scale' changes nothing: it is of nvfp4, and the format here is "
                f"{', '.join(sorted(used))}"
            )
        return found

    def patterns_without_effect(
        self, layers: Collection[str], others: Collection[str] = ()
    ) -> list[str]:
        """The patterns of ``ignore`` and ``format`` that decide about no layer, a sentence for each.

        Those that nobody asked for (the default of ``ignore``, what the preset balanced adds) are left
        out, and so is everything where nothing is quantized whatever the patterns say.

        Args:
            layers: full dotted names of the layers that a format is chosen for; of a fused layer its
                own and those of its projections.
            others: those of linear layers that stay BF16 whatever the recipe says: routers, towers.
        """
        formats = self.format if isinstance(self.format, dict) else {}
        if self.preset == "exact" or self.role == "decode":
            return []
        unasked = set(STATE_WRITERS) if formats.keys() >= set(STATE_WRITERS) else set()
        used = {"default", *unasked}
        for layer in layers:
            if not self.ignores(layer):
                used.update([key for key in formats if matches(key, layer)][:1])
        every = [*layers, *others]
        found = [
            f"recipe key 'ignore': {pattern!r} matches no linear layer of this model"
            for pattern in dict.fromkeys(self.ignore)
            if pattern not in Recipe.ignore and not any(matches(pattern, one) for one in every)
        ]
        for key, fmt in formats.items():
            if key in used:
                continue
            if any(matches(key, layer) for layer in layers):
                why = "changes nothing: 'ignore', or a key before it, names the same layers"
            elif not any(matches(key, layer) for layer in others):
                why = "matches no linear layer of this model"
            elif fmt != "bf16":
                why = "changes nothing: such layers stay BF16 whatever the recipe says"
            else:
                continue
            found.append(f"recipe key 'format': {key!r} {why}")
        return found

    def ignores(self, layer: str) -> bool:
        """Whether the layer of this full dotted name is to stay BF16."""
        return any(matches(pattern, layer) for pattern in self.ignore)

    def format_of(self, layer: str) -> FormatName:
        """The format of the layer of this full dotted name, of a resolved recipe.

        A key of ``format`` is a glob pattern for the full name or for its last component; the
        first that matches counts. Layers that ``ignore`` names are ``bf16``.
        """
        assert isinstance(self.format, dict), "resolve the recipe first"
        if self.ignores(layer):
            return "bf16"
        for pattern, name in self.format.items():
            if pattern != "default" and matches(pattern, layer):
                return name
        return self.format["default"]

    def formats_of_fused(
        self, layer: str, parts: Sequence[str] | None = None
    ) -> tuple[FormatName, ...] | None:
        """The formats of the projections that the layer of this name is fused from, in order.

        Args:
            layer: its full dotted name.
            parts: the last components of the projections' names; by default what
                `FUSED_PROJECTIONS` says of it.

        Returns:
            None if it is not a fused layer, or the recipe speaks of the fused layer itself.
        """
        assert isinstance(self.format, dict), "resolve the recipe first"
        path, _, last = layer.rpartition(".")
        parts = parts or FUSED_PROJECTIONS.get(last)
        if parts is None or self.ignores(layer):
            return None
        if any(key != "default" and matches(key, layer) for key in self.format):
            return None
        return tuple(self.format_of(f"{path}.{part}" if path else part) for part in parts)


def most_precise(formats: Iterable[FormatName]) -> FormatName:
    """The most precise of some formats."""
    order: tuple[FormatName, ...] = ("bf16", "fp8", "int8", "nvfp4")
    return min(formats, key=order.index)


def fastest(native: frozenset[str]) -> FormatName:
    """The fastest of the formats that a device multiplies natively; int8 if there is none."""
    order: tuple[FormatName, ...] = ("nvfp4", "fp8", "int8")
    return next((name for name in order if name in native), "int8")


def _known_keys() -> str:
    return ", ".join(f.name for f in fields(Recipe))
