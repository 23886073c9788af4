"""Runs llm-compressor on a loaded model: its schemes, without its log lines, around its faults."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

Scheme = Literal["nvfp4", "fp8"]
Rounding = Literal["nearest", "gptq"]
Progress = Callable[[str, float], None]

# llm-compressor's names. NVFP4 has static scales for the activations of each layer, measured on
# calibration data; FP8's scales, one per token, need none.
_SCHEMES: dict[Scheme, str] = {"nvfp4": "NVFP4", "fp8": "FP8_DYNAMIC"}


def run(
    model: Any,
    tokenizer: Any,
    scheme: Scheme,
    rounding: Rounding,
    left_alone: list[str],
    data: list[dict[str, Any]] | None,
    into: Path,
    progress: Progress,
) -> None:
    """Quantizes a model in place and saves it.

    Args:
        model: Transformers', with its weights.
        scheme: of all its linear layers but those of `left_alone`.
        rounding: ``gptq`` rounds each layer against the inputs that it has from the layers before it,
            which are quantized already.
        data: calibration inputs; None where none are needed.
        into: the directory of the files.
        progress: is told what is being done, and the share of all that is done (0 to 1).
    """
    import torch
    from torch.utils.data import DataLoader

    progress("Starting llm-compressor", 0.05)
    with _quiet(progress), _granite():
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier

        modifier = GPTQModifier if rounding == "gptq" else QuantizationModifier
        # "basic" reads with the whole model at once: it is in memory, and no tracing is needed.
        pipelines = {"nearest": "datafree" if data is None else "basic", "gptq": "sequential"}
        read = 0.1 if rounding == "gptq" else 0.6  # GPTQ reads all samples before it begins
        loader = None if data is None else DataLoader(_Samples(data, progress, read))  # type: ignore
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=modifier(targets="Linear", scheme=_SCHEMES[scheme], ignore=left_alone),
            dataset=loader,
            pipeline=pipelines[rounding],
        )
        progress("Writing", 0.7)
        # Rounding to E2M1 is compiled there; without a C++ compiler it runs as written, slowly.
        eager = scheme == "nvfp4" and not _compiles()
        with torch.compiler.set_stance("force_eager" if eager else "default"):
            model.save_pretrained(into, save_compressed=True)


class _Samples:
    """A data set that reports how far it was read, which is the progress of calibration."""

    def __init__(self, samples: list[dict[str, Any]], progress: Progress, share: float) -> None:
        self._samples = samples
        self._progress = progress
        self._share = share  # of all that is done

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        done = 0.1 + self._share * index / len(self._samples)
        self._progress(f"Calibrating, {index + 1} of {len(self._samples)}", done)
        return self._samples[index]


def _compiles() -> bool:
    import torch

    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2))
    except Exception:  # many classes, depending on what is missing
        return False
    return True


@contextlib.contextmanager
def _quiet(progress: Progress) -> Iterator[None]:
    """Silences llm-compressor's log lines, warnings and bars: ours say the same.

    GPTQ's bars say which layer it has come to, which is told to ``progress``.
    """
    # Read when they are imported, where they would take over loguru's configuration for this process.
    for library in ("LLM_COMPRESSOR", "COMPRESSED_TENSORS"):
        os.environ.setdefault(f"{library}_LOG_DISABLED", "true")
    from loguru import logger
    from tqdm import tqdm

    start = tqdm.__init__

    def start_hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        if layer := re.match(r"\((\d+)/(\d+)\): Calibrating", str(kwargs.get("desc"))):
            done, of = map(int, layer.groups())
            progress(f"Rounding, {done} of {of} layers", 0.2 + 0.5 * (done - 1) / of)
        start(self, *args, **{**kwargs, "disable": True})

    libraries = ("llmcompressor", "compressed_tensors")
    # GPTQ logs at a level that is made by the configuration left out above.
    with contextlib.suppress(TypeError, ValueError):  # the level is there already
        logger.level("METRIC", no=38)
    for library in libraries:
        logger.disable(library)
    tracing = logging.getLogger("torch.fx._symbolic_trace")  # warns of a call in Transformers
    level = tracing.level
    tracing.setLevel(logging.ERROR)
    tqdm.__init__ = start_hidden
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = start
        tracing.setLevel(level)
        for library in libraries:
            logger.enable(library)


@contextlib.contextmanager
def _granite() -> Iterator[None]:
    """Gives llm-compressor 0.12 a class that Transformers no longer has, so that it can be imported.

    Its search for experts begins by importing all modules that it has code for, GraniteMoE's old one
    among them; from 0.14 it does not. No module is of the class given here.
    """
    from torch import nn
    from transformers.models.granitemoe import modeling_granitemoe

    name = "GraniteMoeParallelExperts"
    if hasattr(modeling_granitemoe, name):
        yield
        return
    setattr(modeling_granitemoe, name, type(name, (nn.Module,), {}))
    try:
        yield
    finally:
        delattr(modeling_granitemoe, name)
