"""The second checkpoint of a recipe: quantized weights that somebody else made, for the prefill copy.

A recipe's ``prefill_model`` names a checkpoint in the compressed-tensors format. Its quantized weights
serve prefill; the main checkpoint, in BF16, serves decode and gives everything else: embeddings,
norms, biases, the output head. That is right only if both are one model, so
`PrefillCheckpoint.check_against` compares what can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixquant.checkpoints.compressed_tensors import CompressedTensors
from mixquant.checkpoints.config import text_config
from mixquant.checkpoints.errors import CheckpointError
from mixquant.checkpoints.quantized_tensors import FormatName, Fp8Tensors, Nvfp4Tensors
from mixquant.checkpoints.tensor_files import TensorFiles
from mixquant.core.layer_names import is_drafter
from mixquant.files.reading import shown

# Keys that have to agree in the two configurations, because the shapes follow from them. A key that is
# missing in one is not compared; the shapes of the tensors are.
_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_intermediate_size",
)
# Tensors of a quantized layer besides its weight, and of the KV cache, by the end of the name.
_AUXILIARY = ("_scale", "_zero_point", "_packed", "_g_idx", "_shape")
_SAMPLED_ROWS = 8
_WHOLE_UP_TO = 2**16  # elements; larger tensors are compared by a sample of their rows
# The largest relative distance of quantized rows from the main model's. Rounding gives 0.10 and 0.03,
# methods that move weights (GPTQ) a little more; weights of another model, or rotated ones, over 1.
_LARGEST_ERROR: dict[FormatName, float] = {"nvfp4": 0.25, "fp8": 0.1}


class PrefillCheckpoint(CompressedTensors):
    """A checkpoint from which the prefill copy of a main model's weights is read. Made by `open`."""

    def check_against(self, main: Mapping[str, Any], main_dir: str | Path | None = None) -> None:
        """Checks that this is the main model, quantized, and nothing else changed.

        Compared are the configurations and, where the main model's files are at hand: the names
        and shapes of all tensors; those that are quantized in neither, bit by bit (small ones in
        whole: norms and biases; of embeddings a sample of rows); and a sample of rows of each
        quantized layer, which must lie near the main model's.

        Args:
            main: config.json of the main model.
            main_dir: the directory of its safetensors files; None: only configurations are compared.

        Raises:
            CheckpointError: the two do not fit together.
        """
        own = text_config(self.config)
        other = text_config(main)
        for key in _ARCHITECTURE:
            if None not in (own.get(key), other.get(key)) and own[key] != other[key]:
                raise self._misfit(
                    f"its {key} is {shown(own[key])}, the main model's {shown(other[key])}"
                )
        if main_dir is not None:
            self._check_tensors(TensorFiles(str(main_dir), Path(main_dir)))

    def _check_tensors(self, main: TensorFiles) -> None:
        for layer in self.formats:
            if f"{layer}.weight" not in main.names:
                raise self._misfit(f"the main model has no layer {layer}")
        for name in sorted(main.names):
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and layer in self.formats:
                self._check_resemblance(layer, main)
            elif name in self.files.names:
                self._check_equal(name, main)
            elif not self._may_lack(name):
                raise self._misfit(f"it lacks {name}")
        for name in sorted(self.files.names - main.names):
            # For example a bias that the quantization added to correct its error.
            if not name.endswith((*_AUXILIARY, "lm_head.weight")):
                raise self._misfit(f"the main model has no {name}")

    def _may_lack(self, name: str) -> bool:
        if name.endswith("lm_head.weight"):
            return bool(text_config(self.config).get("tie_word_embeddings", True))
        # Drafters of multi-token prediction, which writers drop; buffers that old writers stored.
        return is_drafter(name, self.layers) or name.endswith("rotary_emb.inv_freq")

    def _check_equal(self, name: str, main: TensorFiles) -> None:
        shape, main_shape = self.files.shape(name), main.shape(name)
        if shape != main_shape:
            raise self._misfit(f"{name} is {shape}, in the main model {main_shape}")
        rows = None if math.prod(shape) <= _WHOLE_UP_TO else _sample(shape[0])
        own, expected = self.files.get(name, rows), main.get(name, rows)
        if own.dtype != expected.dtype:  # the writer changed its type
            expected = expected.to(own.dtype)
        if not torch.equal(_bytes(own), _bytes(expected)):
            raise self._misfit(
                f"{name} differs from the main model's (SmoothQuant and AWQ fold scales into such "
                "tensors; use a checkpoint made without them)"
            )

    def _check_resemblance(self, layer: str, main: TensorFiles) -> None:
        fmt = self.formats[layer]
        shape, main_shape = self.shape(layer), main.shape(f"{layer}.weight")
        if shape != main_shape:
            raise self._misfit(f"the weight of {layer} is {shape}, in the main model {main_shape}")
        rows = _sample(shape[0])
        expected = main.get(f"{layer}.weight", rows).float()
        own = self.rows(layer, rows).dequantize()
        error, size = float((own - expected).norm()), float(expected.norm())
        if not error <= _LARGEST_ERROR[fmt] * size:
            raise self._misfit(
                f"the weight of {layer} is not the main model's (relative difference "
                f"{error / size if size else math.inf:.2f})"
            )

    def _misfit(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.source} does not fit the main model: {why}")


def check_is_of(tensors: Fp8Tensors | Nvfp4Tensors, weight: Tensor, what: str) -> None:
    """Compares some rows of a quantized weight with the BF16 weight that it was made from.

    They differ if other weights were loaded since, or if an engine lays out rows in another order
    than the checkpoint.

    Args:
        tensors: ``[N, K]``.
        weight: ``[N, K]``, in BF16, FP16 or FP32.
        what: the weight's name, for the message.

    Raises:
        CheckpointError: they differ by more than quantizing explains.
    """
    fmt: FormatName = "fp8" if isinstance(tensors, Fp8Tensors) else "nvfp4"
    rows = _sample(len(weight))
    expected = weight[rows].float().cpu()
    picked = [tensors.rows(row, row + 1).dequantize() for row in rows]
    error = float((torch.cat(picked).cpu() - expected).norm())
    size = float(expected.norm())
    if not error <= _LARGEST_ERROR[fmt] * size:
        raise CheckpointError(
            f"the prefill_model's weight of {what} differs from the loaded weight (relative difference "
            f"{error / size if size else math.inf:.2f}); both must be the same model, with rows in the "
            "same order"
        )


def _sample(rows: int) -> list[int]:
    """The indices of some rows, evenly spaced, first and last among them."""
    count = min(rows, _SAMPLED_ROWS)
    return sorted({round(index * (rows - 1) / max(count - 1, 1)) for index in range(count)})


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous().view(torch.uint8)
