"""Fixtures that start real servers, on ports that nobody else uses, ended with the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from etcd_process import EtcdProcess


@pytest.fixture
def etcd_process(tmp_path: Path) -> Iterator[EtcdProcess]:
    process = EtcdProcess(tmp_path)
    process.start()
    yield process
    process.kill()


@pytest.fixture
def etcd_endpoint(etcd_process: EtcdProcess) -> str:
    """host:port of a fresh etcd."""
    return etcd_process.endpoint
