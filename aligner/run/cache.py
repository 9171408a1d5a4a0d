"""Where this library keeps what it can make again: converted models, indices of data files, the sentiment reward."""

import os
from pathlib import Path


def user_cache() -> Path:
    """$XDG_CACHE_HOME/aligner or ~/.cache/aligner; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aligner"
