"""Which version of the project this is."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """Of the installed distribution; a bare source tree has none."""
    try:
        return importlib.metadata.version("infinite-llm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
