"""The directory in which mixquant keeps files between commands."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where converted models are kept: ``MIXQUANT_CACHE``, or the user's cache directory."""
    if own := os.environ.get("MIXQUANT_CACHE"):
        return Path(os.path.expanduser(own))
    import platformdirs

    return Path(platformdirs.user_cache_dir("mixquant"))
