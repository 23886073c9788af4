"""A tiny pass through a model, to see which rows its linear layers are given.

A plan tells rows of token positions apart. A layer whose rows are others (a learned prompt in front of
the tokens, sequences across instead of along) cannot use it, and nothing but a pass shows that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

SEQUENCES, TOKENS = 2, 5
_ROWS = SEQUENCES * TOKENS
_SHAPES = ((SEQUENCES, TOKENS), (_ROWS,), (1, _ROWS), (_ROWS, 1))  # in front of the features

OTHER_ROWS = "its rows are not the pass's"
NOT_CALLED = "no pass goes through it"


def why_not_its_rows(
    model: PreTrainedModel, linears: Iterable[tuple[str, nn.Linear]]
) -> dict[str, str]:
    """The layers whose rows are not those of a pass of token rows, and why.

    Empty if the model cannot be run like this: then nothing is known.
    """
    linears = list(linears)
    given: dict[str, set[tuple[int, ...]]] = {name: set() for name, _ in linears}
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        for name, linear in linears:

            def note(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                given[name].add(tuple((args[0] if args else kwargs["input"]).shape[:-1]))

            handle = linear.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        for module in training:
            module.training = False
            stack.callback(setattr, module, "training", True)
        try:
            embedding: Any = model.get_input_embeddings()
            ids = torch.arange(_ROWS, device=embedding.weight.device).view(SEQUENCES, TOKENS)
            with torch.no_grad():
                model(input_ids=ids % len(embedding.weight), use_cache=False)
        except Exception:
            logger.debug("cannot run %s for a trial", type(model).__name__, exc_info=True)
            return {}
    return {
        name: OTHER_ROWS if shapes else NOT_CALLED
        for name, shapes in given.items()
        if shapes.isdisjoint(_SHAPES)
    }
