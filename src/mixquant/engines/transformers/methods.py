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
        self.earlier = vars(model).get(name)  # another library's, on this instance

    @property
    def original(self) -> Callable[..., Any]:
        return self.earlier or functools.partial(getattr(type(self.model), self.name), self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)  # Transformers asks which arguments forward takes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.replacement(self.original, self.model, *args, **kwargs)


def put_in_front(model: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
    """Replaces a method of this one module by ``replacement(original, module, *args, **kwargs)``."""
    setattr(model, name, Method(model, name, replacement))
