"""Unix sockets with an owner: a stale file of a dead process is replaced, a live process's is not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from services.core.errors import ConfigError, PeerLostError

MAX_PATH_BYTES = 107  # sun_path less its final zero
_BACKLOG = 1024
_LOCK_TIMEOUT_S = 5.0


class UnixListener:
    """A listening, non-blocking Unix socket whose file only this user may connect to.

    Raises:
        ConfigError: the path is too long, is taken by a live process or by something else than a socket, or its
            directory does not exist.
    """

    def __init__(self, path: Path) -> None:
        length = len(os.fsencode(path))
        if length > MAX_PATH_BYTES:
            raise ConfigError(f"Unix socket path {path} has {length} bytes; choose one of at most {MAX_PATH_BYTES}")
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # The lock makes "is it stale? then replace it" one step among all who start here at once.
            with _locked(path.parent):
                _remove_stale(path)
                self.socket.bind(os.fspath(path))
                os.chmod(path, 0o600)
                self._inode = os.stat(path).st_ino
                self.socket.listen(_BACKLOG)
        except OSError as error:
            self.socket.close()
            raise ConfigError(f"cannot listen on Unix socket {path}: {error.strerror}") from error
        except ConfigError:
            self.socket.close()
            raise

    def close(self) -> None:
        """Stops listening and removes the file unless somebody else has replaced it. Idempotent."""
        if self.socket.fileno() < 0:
            return
        with contextlib.suppress(OSError, ConfigError), _locked(self.path.parent):
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)
        self.socket.close()


def connect_unix(path: Path) -> socket.socket:
    """A non-blocking socket, connected at once: to connect, a Unix socket needs room in the backlog and no accept.

    Raises:
        PeerLostError: nobody listens there, which is so for a path that is too long.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise PeerLostError(f"nobody can listen on Unix socket {path}: it has more than {MAX_PATH_BYTES} bytes")
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise PeerLostError(f"cannot open a socket to connect to {path}: {error.strerror}") from error
    try:
        sock.connect(os.fspath(path))
    except BlockingIOError as error:
        sock.close()
        raise PeerLostError(
            f"the process behind Unix socket {path} accepts no connections: its backlog is full"
        ) from error
    except OSError as error:
        sock.close()
        raise PeerLostError(f"nobody listens on Unix socket {path}: {error.strerror}") from error
    return sock


def _remove_stale(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"cannot listen on Unix socket {path}: the path exists and is not a socket; choose another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        refused = probe.connect_ex(os.fspath(path))
    if refused != errno.ECONNREFUSED:
        raise ConfigError(
            f"cannot listen on Unix socket {path}: a live process listens there; stop it or choose another"
        )
    os.unlink(path)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds an advisory lock on the directory itself, which leaves no lock file behind."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"directory {directory} is locked by another process that starts here") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)
