"""Reads and checks the recipe before anything is loaded, in the process that configures the engine."""

from __future__ import annotations

import difflib
import os
from dataclasses import fields
from typing import Any

import torch

from mixquant.checkpoints.second_checkpoint import opened, with_format_of
from mixquant.checkpoints.tensor_files import directory_of
from mixquant.core.recipe import Recipe, RecipeError
from mixquant.engines.vllm import hardware, versions
from mixquant.engines.vllm.config import QUANTIZATION_METHOD, PhaseQuantizationConfig
from mixquant.engines.vllm.counters import Counters
from mixquant.engines.vllm.log import logger
from mixquant.errors import MixquantError


class SettingsError(MixquantError, ValueError):
    """An engine that mixquant cannot serve as asked. The message is one line."""


def settle(vllm_config: Any) -> None:
    """Decides the recipe, and writes it where vLLM hashes it into the key of its compile cache."""
    method = vllm_config.quant_config
    if not isinstance(method, PhaseQuantizationConfig):
        return
    from mixquant._version import __version__

    given = vllm_config.additional_config.get(QUANTIZATION_METHOD)
    if given is None and method.recipe_in_checkpoint is not None:
        given = method.recipe_in_checkpoint
    recipe = resolve(given)
    # What another process resolved has a threshold.
    method.default_threshold |= _recipe_of(given).min_prefill_tokens is None
    _check_recipe(vllm_config, recipe)
    if not (
        isinstance(given, dict) and "version" in given
    ):  # else it was said where it was resolved
        for sentence in _recipe_of(given).settings_without_effect(recipe):
            logger.warning(sentence)
    if recipe.prefill_attention == "int8":
        logger.warning(
            "recipe key 'prefill_attention': int8 has no effect in vLLM; it is for Transformers on a CPU"
        )
    if recipe.prefill_model is not None:
        checkpoint = opened(recipe.prefill_model).checkpoint
        model = vllm_config.model_config
        main = directory_of(model.model, model.revision)  # vLLM would download it all the same
        checkpoint.check_against(model.hf_config.to_dict(), main)
    if recipe.role == "prefill" and vllm_config.kv_transfer_config is None:
        logger.warning(
            "role 'prefill' without --kv-transfer-config: no other engine decodes, so generated "
            "tokens are quantized, too"
        )
    method.recipe = recipe
    if getattr(vllm_config, "speculative_config", None) is not None:
        method.layers = vllm_config.model_config.get_total_num_hidden_layers()
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        QUANTIZATION_METHOD: {**recipe.to_dict(), "version": __version__},
    }
    if method.counters is None:
        method.counters = Counters.create(vllm_config.parallel_config.data_parallel_size)


def resolve(given: Any) -> Recipe:
    """The recipe with everything decided for this machine.

    Args:
        given: what stands under ``mixquant`` in vLLM's additional_config: None, a preset's name, a
            JSON file's path, or the fields of a recipe.

    Raises:
        RecipeError: an invalid recipe, or a format that the device does not multiply natively
            although ``emulate`` was not asked for.
    """
    recipe = _recipe_of(given)
    native, device = hardware.native_in_vllm()
    if recipe.prefill_model is not None and recipe.role != "decode":
        recipe = with_format_of(recipe)
    resolved = recipe.resolved(native, hardware.is_gpu())
    assert isinstance(resolved.format, dict)
    foreign = sorted(set(resolved.format.values()) - native - {"bf16"})
    if foreign and not recipe.emulate:
        can = ", ".join(sorted(native)) or "none of the formats"
        instead = "leave 'format' at auto" if native else "take preset exact for BF16"
        raise RecipeError(
            f"{device} does not multiply {foreign[0]} natively (it does {can}); {instead}, or set "
            "'emulate' to true to run it slower than BF16"
        )
    return resolved


def _recipe_of(given: Any) -> Recipe:
    if given is None:
        return Recipe()
    if isinstance(given, str):
        return Recipe.load(given)
    if isinstance(given, dict):
        # What another process, or a copy of the configuration, resolved before.
        return Recipe.from_dict({key: given[key] for key in given if key != "version"})
    raise RecipeError(
        f"additional_config['mixquant'] has to be a recipe or the path of its file, not {given!r}"
    )


def _misplaced(additional_config: dict[str, Any]) -> str | None:
    """A key that was meant for the recipe, or for its place, where there is none: or None.

    Other keys may be another plugin's.
    """
    if QUANTIZATION_METHOD in additional_config:
        return None
    ours = {one.name for one in fields(Recipe)}
    like = difflib.get_close_matches(QUANTIZATION_METHOD, additional_config, n=1, cutoff=0.75)
    return next((key for key in additional_config if key in ours), like[0] if like else None)


def _check_recipe(vllm_config: Any, recipe: Recipe) -> None:
    """Refuses what cannot work with a recipe that quantizes. Raises SettingsError."""
    assert isinstance(recipe.format, dict)
    if set(recipe.format.values()) == {"bf16"} and recipe.prefill_attention != "fp8":
        return
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0":
        raise SettingsError(
            "VLLM_BATCH_INVARIANT promises answers that do not depend on the batch, but which rows "
            "mixquant quantizes depends on their pass; unset the variable, or use preset exact"
        )
    transfer = getattr(getattr(vllm_config, "weight_transfer_config", None), "backend", "ipc")
    if transfer not in ("nccl", "ipc"):
        raise SettingsError(
            f"with the weight transfer backend {transfer!r}, mixquant's copies would keep the old "
            "weights; use nccl or ipc, or preset exact"
        )
    dtype = getattr(vllm_config.model_config, "dtype", None)
    if hardware.is_gpu() and dtype == torch.float32:
        raise SettingsError(
            "vLLM's quantized products on a GPU write BF16 or FP16, not float32; leave out --dtype "
            "float32, or use preset exact"
        )


def check(vllm_config: Any) -> None:
    """Refuses what cannot work. Raises UnsupportedVersion or SettingsError."""
    import vllm

    versions.require(vllm.__version__)
    if not isinstance(vllm_config.additional_config, dict):
        raise SettingsError(
            "mixquant reads its recipe from additional_config, which has to be a JSON object"
        )
    if (misplaced := _misplaced(vllm_config.additional_config)) is not None:
        raise SettingsError(
            f"additional_config has the key {misplaced!r} but no key 'mixquant'; put the recipe under "
            'that key: {"mixquant": {...}}'
        )
    if (unsupported := hardware.why_unsupported()) is not None:
        raise SettingsError(unsupported)
    if getattr(vllm_config.model_config, "quantization_config", None) is not None:
        raise SettingsError(
            "--quantization-config is for vLLM's own quantization; give mixquant its recipe in "
            "--additional-config"
        )
    parallel = vllm_config.parallel_config
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1:
        raise SettingsError(
            "mixquant cannot run with dual-batch overlap: it splits a pass in two, and the plan "
            "fits neither half; leave out --enable-dbo and --ubatch-size"
        )
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise SettingsError(
            "mixquant cannot run with prefill context parallelism: its passes hold pieces of "
            "sequences; leave out --prefill-context-parallel-size"
        )
    model = vllm_config.model_config
    if model.runner_type == "pooling":
        raise SettingsError(
            f"{model.model} is run as a pooling model, which has no decode phase to keep precise; "
            "use --quantization fp8 there"
        )
    if model.is_encoder_decoder:
        raise SettingsError(
            f"{model.model} is an encoder-decoder model; mixquant serves decoder-only ones"
        )
