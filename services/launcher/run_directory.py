"""The directory of one run: configuration files, logs, sockets, etcd's and Redis's data.

The launcher holds a lock on the file ``lock`` in it for as long as it lives; the kernel lets go of it however the
launcher ends. So a directory whose lock is free was left behind by a dead launcher, and the next start clears it away.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Self

from services.core.errors import ConfigError

_LOCK = "lock"
_PREFIX = "run-"
# A Unix socket's path has at most 107 bytes, and the names in the socket directory take some of them.
_MAX_SOCKET_DIR_BYTES = 84


class RunDirectory:
    """A fresh directory, locked until ``close``."""

    def __init__(self, path: Path, lock: IO[str], *, temporary: bool) -> None:
        self.path = path
        self.configs = path / "config"
        self.logs = path / "logs"
        self.sockets = path / "sockets"
        self.data = path / "data"
        self._lock = lock
        self._temporary = temporary
        for directory in (self.configs, self.logs, self.sockets, self.data):
            directory.mkdir(mode=0o700)

    @classmethod
    def create(cls, wanted: Path | None) -> Self:
        """A run directory: ``wanted``, or a new one in the user's temporary directory.

        Raises:
            ConfigError: ``wanted`` is used by another launcher, holds something else, or has too long a path.
        """
        if wanted is None:
            base = Path(tempfile.gettempdir()) / f"infinite-llm-{os.getuid()}"
            base.mkdir(mode=0o700, exist_ok=True)
            if base.stat().st_uid != os.getuid():
                raise ConfigError(f"{base} belongs to another user; set TMPDIR or give --run-dir")
            for old in base.glob(f"{_PREFIX}*"):
                _remove_if_dead(old)
            path = Path(tempfile.mkdtemp(prefix="new-", dir=base))
        else:
            path = wanted.expanduser().resolve()
            _clear(path)
        lock = (path / _LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            lock.close()
            raise ConfigError(f"run directory {path} is used by another launcher") from exc
        if wanted is None:
            # Only now may other launchers see it: it is locked, so none takes it for a dead one's.
            path = path.rename(path.with_name(path.name.replace("new-", _PREFIX, 1)))
        run = cls(path, lock, temporary=wanted is None)
        if len(os.fsencode(run.sockets)) > _MAX_SOCKET_DIR_BYTES:
            run.close(keep=False)
            raise ConfigError(
                f"run directory {path}: the path is too long for the Unix sockets in it; give a shorter --run-dir"
            )
        return run

    def close(self, *, keep: bool) -> None:
        """Gives the directory up. A temporary one is deleted unless ``keep`` says that its logs may be wanted."""
        if self._temporary and not keep:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _clear(path: Path) -> None:
    """Makes ``path`` an empty directory if it is one, or if it is the run directory of a dead launcher."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not any(path.iterdir()):
        return
    if not (path / _LOCK).is_file():
        raise ConfigError(f"run directory {path} is not empty and no former run directory; give another --run-dir")
    if not _remove_if_dead(path):
        raise ConfigError(f"run directory {path} is used by another launcher; give another --run-dir")
    path.mkdir(mode=0o700)


def _remove_if_dead(path: Path) -> bool:
    """Deletes a run directory that no living launcher holds; answers whether it did."""
    try:
        with (path / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            return True
    except (FileNotFoundError, NotADirectoryError, BlockingIOError):
        return False
