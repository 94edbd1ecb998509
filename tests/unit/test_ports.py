"""Ports for servers that are about to begin."""

import socket

import pytest

from services.core.errors import ConfigError
from services.launcher import ports
from services.launcher.ports import HOST, claim_port, free_ports


@pytest.fixture
def outgoing(tmp_path, monkeypatch):
    """Sets which ports the kernel is said to give to outgoing connections."""
    path = tmp_path / "ip_local_port_range"
    monkeypatch.setattr(ports, "_OUTGOING", path)
    return path.write_text


def test_none_that_an_outgoing_connection_may_take(outgoing):
    outgoing("10500\t60999\n")
    found = free_ports(200)
    assert len(set(found)) == 200
    assert all(10_000 <= port < 10_500 for port in found)
    assert 10_000 <= claim_port("--http-port", 0) < 10_500


def test_none_that_is_taken(outgoing):
    outgoing("10020\t60999\n")
    (port,) = free_ports(1)
    with socket.socket() as taken:
        taken.bind((HOST, port))
        found = free_ports(25)
        assert len(set(found)) == 25
        assert port not in found
        with pytest.raises(ConfigError, match=f"--http-port {port}"):
            claim_port("--http-port", port)


@pytest.mark.parametrize("content", ["", "1024 65535", "what"])
def test_any_where_there_are_no_others(outgoing, content):
    outgoing(content)
    assert len(set(free_ports(3))) == 3
