"""Methods of one module, put in front of those of its class."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class Method:
    """A method of one module, in front of its class's own, which it gets as its first argument.

    An object and not a closure, so that a prepared model can be copied and pickled.
    """

    def __init__(self, model: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
        self.model = model
        self.name = name
        self.replacement = replacement
        # Another library's, on this instance, or the class's own.
        earlier = vars(model).get(name)
        self.original = earlier or functools.partial(getattr(type(model), name), model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)  # Transformers asks which arguments forward takes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.replacement(self.original, self.model, *args, **kwargs)


def put_in_front(model: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
    """Replaces a method of this one module by ``replacement(original, module, *args, **kwargs)``."""
    setattr(model, name, Method(model, name, replacement))
