"""Makes Python processes see a processor with AVX2 and no more, so that tests run as they do on one.

    PYTHONPATH=scripts/as_avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m pytest ...

The two variables hold for oneDNN and PyTorch's own kernels. Here, what PyTorch says of the processor is
changed: by it vLLM chooses its compiled library, and mixquant its INT8 kernel. Code that TorchInductor
and vLLM make meanwhile goes into caches of its own: elsewhere it would write beyond its buffers.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from types import ModuleType

for _name in ("TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT"):
    os.environ.setdefault(_name, os.path.join(tempfile.gettempdir(), f"as_avx2-{_name.lower()}"))

LACKING = (
    "_is_avx512_supported",
    "_is_avx512_bf16_supported",
    "_is_vnni_supported",
    "_is_amx_tile_supported",
    "_is_amx_fp16_supported",
)


class _Loader(importlib.abc.Loader):
    """Loads the module as its own loader does, then changes it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for name in LACKING:
            if hasattr(module, name):
                setattr(module, name, lambda: False)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch.cpu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
