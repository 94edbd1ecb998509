"""A service's process, quick to begin and to end.

A service is loaded by thousands of modules (torch's, transformers'), and what they make stays until the process ends.
Looking for garbage among it is a fifth of the time that loading takes; afterwards it would be a part of every full
collection, in which no token is computed.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def loading() -> Iterator[None]:
    """Around a service's imports: nothing is collected meanwhile, and nothing of what is there then is ever again."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def leave(code: int) -> NoReturn:
    """Ends the process of a service that has closed what it had opened.

    At once: the interpreter would first take all of its modules apart, a second of work where torch is loaded.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
