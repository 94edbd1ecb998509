"""Which sizes of tiles were measured to be the best, and the file that keeps them.

The file is JSON, ``{"version": 1, "gpus": {name of the GPU: {shape: sizes}}}``, in the directory that
INFINITE_LLM_KERNEL_CACHE names, or ``infinite-llm`` in the user's cache directory (XDG_CACHE_HOME, ``~/.cache``). A
file that cannot be read, or is of another make, is as good as none: it is reported, and the defaults stand.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from kernels.triton.tiling import Gpu, Kind, Shape, Tiling, candidates, default, with_other_programs

_log = logging.getLogger(__name__)

CACHE_VARIABLE = "INFINITE_LLM_KERNEL_CACHE"
_FILE = "triton-tilings.json"
_VERSION = 1  # of the kernels' sizes and what they mean
_LARGEST = 4096


def cache_directory() -> Path:
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infinite-llm"


class TilingCache:
    """Tuned sizes, by GPU and shape, read from a file at the first use.

    Args:
        directory: where the file is; None: ``cache_directory()``.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.path = (cache_directory() if directory is None else directory) / _FILE
        self._tilings: dict[str, dict[str, Tiling]] | None = None

    def tiling(self, gpu: Gpu, shape: Shape) -> Tiling:
        """The tuned sizes, or the default ones where none were measured."""
        return self.tuned(gpu, shape) or default(gpu, shape)

    def tuned(self, gpu: Gpu, shape: Shape) -> Tiling | None:
        if self._tilings is None:
            self._tilings = _read(self.path)
        return self._tilings.get(gpu.name, {}).get(shape.key)

    def keep(self, gpu: Gpu, shape: Shape, tiling: Tiling) -> None:
        """Keeps sizes for this process and, if the file can be written, for later ones."""
        # What other processes have measured meanwhile stays.
        tilings = _read(self.path)
        for name, known in (self._tilings or {}).items():
            tilings[name] = {**tilings.get(name, {}), **known}
        tilings.setdefault(gpu.name, {})[shape.key] = tiling
        self._tilings = tilings
        try:
            _write(self.path, tilings)
        except OSError as error:
            _log.warning("tuned kernel sizes are not kept in %s: %s", self.path, error)


def choose(gpu: Gpu, shape: Shape, measure: Callable[[Tiling], float]) -> Tiling | None:
    """The best sizes for a shape, or None if nothing could be measured.

    Args:
        measure: seconds of a launch with these sizes; raises what it likes if they cannot be launched.
    """
    best = _fastest(candidates(gpu, shape), measure)
    if best is None or shape.kind is Kind.PREFILL:
        return best
    return _fastest([best, *with_other_programs(best)], measure)


def _fastest(tried: Iterable[Tiling], measure: Callable[[Tiling], float]) -> Tiling | None:
    best, least = None, float("inf")
    for tiling in tried:
        try:
            seconds = measure(tiling)
        except Exception as error:  # Triton's errors have no common base: too much shared memory, a failed compilation
            _log.info("kernel sizes %s cannot be used: %s", tiling, error)
            continue
        if seconds < least:
            best, least = tiling, seconds
    return best


def _read(path: Path) -> dict[str, dict[str, Tiling]]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning("tuned kernel sizes in %s are ignored: %s", path, error)
        return {}
    try:
        if found["version"] != _VERSION:
            raise ValueError(f"version {found['version']}; this program knows {_VERSION}")
        return {name: {key: _tiling(sizes) for key, sizes in shapes.items()} for name, shapes in found["gpus"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _log.warning("tuned kernel sizes in %s are ignored: not a file of this program (%r)", path, error)
        return {}


def _tiling(sizes: dict[str, Any]) -> Tiling:
    chosen = {field.name: sizes[field.name] for field in fields(Tiling)}
    for name, number in chosen.items():
        if type(number) is not (bool if name == "descriptors" else int) or not 0 <= number <= _LARGEST:
            raise ValueError(f"{name} cannot be {number!r}")
    tiling = Tiling(**chosen)
    for name, least in (("tile_rows", 16), ("tile_keys", 16), ("num_warps", 1), ("num_stages", 1), ("programs", 1)):
        number = getattr(tiling, name)
        if number < least or (name not in ("num_stages", "programs") and number & (number - 1)):
            raise ValueError(f"{name} cannot be {number}")
    return tiling


def _write(path: Path, tilings: dict[str, dict[str, Tiling]]) -> None:
    """A reader sees the old file or the new one, whole."""
    gpus = {name: {key: asdict(tiling) for key, tiling in shapes.items()} for name, shapes in tilings.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{_FILE}.", delete=False) as file:
        json.dump({"version": _VERSION, "gpus": gpus}, file, indent=2)
        file.write("\n")
    os.replace(file.name, path)
