"""API keys: who may use a gateway's public APIs.

A file holds one line for each key, ``name sha256:HEX``; blank lines and lines that begin with # are comments. Keys
themselves are kept nowhere. They are 256 random bits (``infinite-llm new-key``), so a plain hash of them is as good as
any. The file is read again when it has changed: a key is revoked by removing its line.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from pathlib import Path

from services.core.errors import ConfigError, UnauthenticatedError

logger = logging.getLogger(__name__)
_PREFIX = "illm-"
_LINE = re.compile(r"(?P<name>[A-Za-z0-9._@-]{1,64})\s+sha256:(?P<digest>[0-9a-f]{64})")
_LOOK_S = 1.0  # between two looks at the file


def new_key(name: str) -> tuple[str, str]:
    """A new key, and the line of it for the file.

    Raises:
        ConfigError: the name has other characters than letters, digits and ``.-_@``.
    """
    key = _PREFIX + secrets.token_urlsafe(32)
    line = f"{name} sha256:{_digest(key)}"
    if _LINE.fullmatch(line) is None:
        raise ConfigError(f"{name!r}: a key's name has 1 to 64 letters, digits and .-_@")
    return key, line


class ApiKeys:
    """The keys of one file.

    Raises:
        ConfigError: the file cannot be read, or a line is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked_at = 0.0  # monotonic
        self._stamp = self._stamp_now()
        self._names = _read(path)

    def name_of(self, authorization: str | None) -> str:
        """The name of the key in an ``Authorization`` header, ``Bearer KEY``.

        Raises:
            UnauthenticatedError: there is none, or it is none of these.
        """
        self._look()
        kind, _, key = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            raise UnauthenticatedError("an API key is needed: send it as 'Authorization: Bearer KEY'")
        digest = _digest(key.strip())
        found = ""
        for known, name in self._names.items():  # all of them: how long it takes tells nothing
            if hmac.compare_digest(known, digest):
                found = name
        if not found:
            raise UnauthenticatedError("the API key is not known here: it is mistyped or revoked")
        return found

    def _look(self) -> None:
        """Reads the file again if it has changed. What cannot be read changes nothing: a slip locks nobody out."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        try:
            stamp = self._stamp_now()
            if stamp != self._stamp:
                self._names = _read(self._path)
                self._stamp = stamp
                logger.info("API keys read again", extra={"keys": len(self._names)})
        except ConfigError as error:
            logger.error("API keys not read again: %s", error)

    def _stamp_now(self) -> tuple[int, int, int]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise ConfigError(f"api_keys: {self._path} cannot be read: {error}") from error
        return status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path) -> dict[str, str]:
    """Names by digest."""
    names: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"api_keys: {path} cannot be read: {error}") from error
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ConfigError(f"api_keys: {path}, line {number}: must be 'name sha256:64 hexadecimal digits'")
        names[match["digest"]] = match["name"]
    return names


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
