"""Writes a quantized checkpoint with llm-compressor: a model's weights in NVFP4 or FP8.

The result is in the compressed-tensors format. vLLM can serve it alone. mixquant takes it as the
second checkpoint of a recipe (``prefill_model``), which gives the prefill copy of the weights.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import shutil
import sysconfig
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mixquant.checkpoints import llm_compressor, models
from mixquant.checkpoints.errors import ModelError
from mixquant.checkpoints.llm_compressor import Progress, Rounding, Scheme
from mixquant.core.layer_names import is_router
from mixquant.core.recipe import Recipe
from mixquant.errors import one_line
from mixquant.files import scratch
from mixquant.files.writing import is_out_of_space, sync

_BYTES_PER_WEIGHT: dict[Scheme, float] = {"nvfp4": 0.5625, "fp8": 1.0}
_SAMPLES: dict[Rounding, int] = {"nearest": 16, "gptq": 64}
_SAMPLE_TOKENS = 512
# GPTQ fits the weights to its texts. So these are not the ones that `mixquant fidelity` reads, nor those
# of benchmarks/unseen_texts.py.
_MODULES = (
    "ast",
    "datetime",
    "doctest",
    "enum",
    "inspect",
    "pickle",
    "socket",
    "tarfile",
    "typing",
)


class QuantizeError(ModelError):
    """A checkpoint that cannot be written. The message is one line and says what to do."""


def quantize(
    model: str,
    out: str | Path,
    scheme: Scheme = "nvfp4",
    *,
    rounding: Rounding = "nearest",
    ignore: Sequence[str] = (),
    samples: int | None = None,
    text: str | None = None,
    say: Callable[[str], None] = lambda message: None,
    progress: Progress = lambda doing, share: None,
) -> Path:
    """Writes a model's quantized checkpoint into a new directory.

    Quantized are the linear layers of the text decoder. The output head, expert routers, vision and
    audio towers, and layers whose shape the kernels cannot multiply stay as they are. Scales come
    from the largest magnitudes. Norms and embeddings are not touched, so that the result fits the
    checkpoint that it was made from (`PrefillCheckpoint.check_against`, which it has passed).

    GPTQ (arXiv 2210.17323) rounds the weights of a layer so that its products with the inputs of
    calibration texts change little. It goes from layer to layer, and the inputs are those that come out
    of the quantized layers before.

    The directory appears whole or not at all: files are written to one beside it, ``.NAME.*.partial``,
    which takes its name at the end and goes away if anything fails (not if the process is killed).

    Args:
        model: a directory, a hub name, or ``smollm2``.
        out: the directory to write; may exist if it is empty. The one that it is in must exist.
        scheme: ``nvfp4`` (blocks of 16, static activation scales) or ``fp8`` (a scale per channel,
            activations per token).
        rounding: of weights: to the ``nearest`` code, or by ``gptq``, which is closer to the model and
            takes minutes longer.
        ignore: more layers to leave alone: glob patterns for full names or for their last
            components. vLLM fuses q, k and v, and gate and up: ignore all of a group or none.
        samples: how many pieces of 512 tokens are calibrated on: 16 by default, and 64 for GPTQ. With
            ``nearest`` they decide the activation scales of NVFP4 alone, not the weights.
        text: to calibrate on. By default Python's documentation, and for GPTQ modules of its library.
        say: is told, in one line, what takes long.
        progress: is told what is being done, and the share of all that is done (0 to 1).

    Returns:
        The directory.

    Raises:
        QuantizeError: `out` cannot be written or is not empty, there is no space, llm-compressor is
            not installed or fails, a pattern of `ignore` matches no layer, or `text` is empty or not
            needed.
        ModelError: the model cannot be had or is quantized already.
    """
    out = Path(os.path.expanduser(out))
    if scheme not in _BYTES_PER_WEIGHT:
        raise QuantizeError(f"unknown format {scheme!r}; expected {' or '.join(_BYTES_PER_WEIGHT)}")
    if rounding not in _SAMPLES:
        raise QuantizeError(f"unknown rounding {rounding!r}; expected {' or '.join(_SAMPLES)}")
    if samples is None:
        samples = _SAMPLES[rounding]
    if samples < 1:
        raise QuantizeError(f"calibration needs at least one sample, not {samples}")
    calibrated = scheme == "nvfp4" or rounding == "gptq"
    if text is not None and not calibrated:
        raise QuantizeError("fp8 rounded to the nearest code is not calibrated; leave the text out")
    if text is not None and not text.strip():
        raise QuantizeError("the text to calibrate on is empty")
    _check_out(out)
    if importlib.util.find_spec("llmcompressor") is None:
        raise QuantizeError(
            "llm-compressor is not installed; run: pip install 'mixquant[quantize]'"
        )

    checkpoint = models.find(model, say)
    progress(f"Loading {model}", 0.0)
    tokenizer = models.load_tokenizer(checkpoint)
    loaded = models.load_model(checkpoint)
    left_alone = _left_alone(loaded, scheme, ignore)
    _check_space(loaded, scheme, left_alone, out)
    data = None
    if calibrated:
        if text is None:
            text = _library() if rounding == "gptq" else _documentation()
        data = _calibration(text, tokenizer, samples, checkpoint.context)

    # Not from tempfile, whose directories are for the owner alone: another user may serve the model.
    partial = out.absolute().parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    scratch.sweep(partial.parent, f".{glob.escape(out.name)}.*.partial")
    try:
        partial.mkdir()
        scratch.own(partial)
        if checkpoint.config.get("quantization_config"):
            # llm-compressor reads the model's config.json and would take a recipe of mixquant in it
            # for the sign of a quantized model: give it one without.
            loaded.config.save_pretrained(partial)
            loaded.config.name_or_path = str(partial)
        llm_compressor.run(loaded, tokenizer, scheme, rounding, left_alone, data, partial, progress)
        tokenizer.save_pretrained(partial)
        _check_result(partial, checkpoint)
        for file in filter(Path.is_file, partial.rglob("*")):
            sync(file)  # or a power failure leaves a renamed directory of empty files
            file.chmod(0o666 & ~_umask())
        scratch.keep(partial)
        partial.rename(out)
    except ModelError:
        raise
    except Exception as error:  # llm-compressor raises any class
        why = "no disk space left" if is_out_of_space(error) else _describe(error)
        raise QuantizeError(f"cannot quantize {model} into {out}: {why}") from error
    finally:
        scratch.remove(partial)
    progress("Done", 1.0)
    return out


def _check_out(out: Path) -> None:
    if os.path.lexists(out):
        if not os.path.isdir(out) or os.path.islink(out):
            raise QuantizeError(f"cannot write {out}: it exists and is not a directory")
        if any(out.iterdir()):
            raise QuantizeError(f"cannot write {out}: the directory is not empty")
    parent = out.absolute().parent
    if not os.path.isdir(parent):
        raise QuantizeError(f"cannot write {out}: there is no directory {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise QuantizeError(f"cannot write {out}: {parent} is not writable")


def _left_alone(model: Any, scheme: Scheme, ignore: Sequence[str]) -> list[str]:
    """The names of the linear layers that are not quantized; checks those that are.

    Raises:
        QuantizeError: a pattern matches nothing, nothing is left, or a weight holds NaN or infinity.
    """
    import torch
    from torch import nn

    inside = {id(module) for module in model.get_decoder().modules()}
    head = model.get_output_embeddings()
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    chosen = Recipe.from_dict({"ignore": list(ignore)})
    for pattern in ignore:
        one = Recipe.from_dict({"ignore": [pattern]})
        if not any(one.ignores(name) for name, _ in linears):
            raise QuantizeError(f"{pattern!r} to ignore matches no linear layer")

    names = []
    for name, linear in linears:
        if (
            id(linear) not in inside
            or linear is head
            or is_router(name)
            or chosen.ignores(name)
            or not _multiplies(scheme, *linear.weight.shape)
        ):
            names.append(name)
        elif not torch.isfinite(linear.weight).all():
            raise QuantizeError(
                f"the weight of {name} holds NaN or infinity; the checkpoint is damaged"
            )
    if len(names) == len(linears):
        raise QuantizeError("no linear layer is left to quantize; ignore fewer layers")
    return names


def _multiplies(scheme: Scheme, out_features: int, in_features: int) -> bool:
    """Whether the tensor cores accept a weight of this shape."""
    from mixquant.formats import BY_NAME, Kernel, fp8

    kernel = fp8.SCALED_MM if scheme == "fp8" else Kernel("the tensor cores", native=True)
    return BY_NAME[scheme].why_not(out_features, in_features, kernel) is None


def _check_space(model: Any, scheme: Scheme, left_alone: Sequence[str], out: Path) -> None:
    from torch import nn

    needed = sum(parameter.nbytes for parameter in model.parameters())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in left_alone:
            weight = module.weight
            needed -= weight.nbytes - int(weight.numel() * _BYTES_PER_WEIGHT[scheme])
    parent = out.absolute().parent
    if (free := shutil.disk_usage(parent).free) < needed:
        raise QuantizeError(
            f"no disk space to write {out}: {parent} has {free / 1e6:.0f} MB free, "
            f"{needed / 1e6:.0f} MB are needed"
        )


def _documentation() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _library() -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for name in _MODULES if (file := folder / f"{name}.py").is_file()]
    return "\n\n".join(file.read_text("utf-8") for file in files) or _documentation()


def _calibration(
    text: str, tokenizer: Any, samples: int, context: int | None
) -> list[dict[str, Any]]:
    """Pieces of a text, evenly spaced, as inputs of the model."""
    tokens = min(_SAMPLE_TOKENS, context or _SAMPLE_TOKENS)
    # Eight characters for a token are more than any tokenizer needs for English.
    characters = min(8 * tokens, len(text))
    step = (len(text) - characters) // samples
    pieces = [text[start * step : start * step + characters] for start in range(samples)]
    return [
        {
            key: values[0]
            for key, values in tokenizer(
                piece, truncation=True, max_length=tokens, return_tensors="pt"
            ).items()
            if key in ("input_ids", "attention_mask")
        }
        for piece in pieces
    ]


def _check_result(written: Path, checkpoint: models.Checkpoint) -> None:
    from mixquant.checkpoints.prefill import PrefillCheckpoint

    source = Path(checkpoint.source)
    main = source if source.is_dir() and any(source.glob("*.safetensors")) else None
    PrefillCheckpoint.open(written).check_against(checkpoint.config, main)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _describe(error: Exception) -> str:
    line = one_line(error)
    return line if isinstance(error, OSError) else f"{type(error).__name__}: {line}"
