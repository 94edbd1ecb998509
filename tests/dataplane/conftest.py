"""Transports for tests, by backend."""

import shutil
import tempfile
from pathlib import Path

import pytest
from stations import BACKENDS, Net, ShmBackend, TcpBackend


@pytest.fixture
def directory():
    """A short path: Unix sockets allow 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="dp-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=list(BACKENDS))
def net(request, directory):
    net = Net(BACKENDS[request.param](directory))
    yield net
    net.close()


@pytest.fixture
def tcp_net(directory):
    net = Net(TcpBackend(directory))
    yield net
    net.close()


@pytest.fixture
def any_net():
    """Of stations that the test makes itself."""
    net = Net(None)
    yield net
    net.close()


@pytest.fixture(params=["tcp", "tls"])
def stream_net(request, directory):
    net = Net(BACKENDS[request.param](directory))
    yield net
    net.close()


@pytest.fixture
def shm_net(directory):
    net = Net(ShmBackend(directory))
    yield net
    net.close()
