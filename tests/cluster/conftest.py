"""Checkpoints and a gateway for cluster tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from greedy import Reference, greedy
from http_rig import HttpRig, running_rig
from random_llama import write_random_llama
from redis_process import RedisProcess

from services.launcher.needle.checkpoint import write_checkpoint
from services.launcher.needle.spec import needle_spec


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See random_llama.py."""
    path = tmp_path_factory.mktemp("models") / "random-llama"
    write_random_llama(path)
    return path


@pytest.fixture(scope="session")
def needle_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The needle checkpoint with six retrieve layers, so that every layer's KV is needed for an answer."""
    path = tmp_path_factory.mktemp("models") / "needle"
    write_checkpoint(path, needle_spec("std", layers=8), "bfloat16")
    return path


@pytest.fixture(scope="session")
def clear_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise, with logits so far apart that answers of hundreds of tokens have no near-tie."""
    path = tmp_path_factory.mktemp("models") / "clear-llama"
    write_random_llama(path, logit_scale=4.0)
    return path


@pytest.fixture(scope="session")
def greedy_reference(random_llama: Path) -> Reference:
    """transformers' own greedy continuation: tokens, and the margin between the best two logits at each."""
    return greedy(random_llama)


@pytest.fixture(scope="session")
def clear_reference(clear_llama: Path) -> Reference:
    """The same of ``clear_llama``."""
    return greedy(clear_llama)


@pytest.fixture(scope="module")
def http_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpRig]:
    """Shared by a file's tests: see http_rig.py."""
    with running_rig(tmp_path_factory.mktemp("gateway")) as rig:
        yield rig


@pytest.fixture
def redis_process(tmp_path: Path) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path)
    yield process
    process.signal(signal.SIGKILL)
