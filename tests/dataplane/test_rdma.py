"""What only the rdma transport does: peers that do not keep to its protocol, and a machine without NIXL."""

import subprocess
import sys
import time

import pytest
from authority import Authority, mutual_tls
from stations import LIMITS, Net, RdmaBackend, Station

from services.core.errors import ConfigError
from services.dataplane import rdma
from services.dataplane.rdma import RdmaTransport
from services.dataplane.rdma_notes import REPORT, Introduction, Note, control_limits, unpack_introduction
from services.dataplane.select import ListenOptions, connecting_transport, listening_transport
from services.dataplane.tcp import TcpTransport
from services.dataplane.transport import Connected, Lost


@pytest.fixture
def net(directory):
    net = Net(RdmaBackend(directory))
    yield net
    net.close()


@pytest.fixture
def stranger(net):
    """A station that speaks only what lies below, and its connection to an rdma station."""
    server = net.station("server")
    stranger = Station(TcpTransport("127.0.0.1:0"))
    net.stations.append(stranger)
    control = stranger.transport.connect(server.address.replace("rdma:", "tcp:"), b"rdma", control_limits(LIMITS))
    return server, stranger, control


def test_without_nixl_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl_cu12", None)
    with pytest.raises(ConfigError, match=r"infinite-llm\[rdma\]"):
        RdmaTransport()
    with pytest.raises(ConfigError, match=r"infinite-llm\[rdma\]"):
        connecting_transport("rdma", None)


def test_who_does_not_choose_rdma_imports_nothing_of_it():
    code = "import sys, services.dataplane.select; sys.exit('nixl_cu12' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_chosen_by_configuration(net, directory):
    options = ListenOptions(directory / "shm", "127.0.0.1:0", None, allow_insecure=False)
    listening = listening_transport(("shm", "rdma"), options, "100gbit,1us")
    connecting = connecting_transport("rdma", "100gbit,1us")
    try:
        connection = connecting.connect(listening.offers.addresses[1], b"", LIMITS)
        events, deadline = [], time.monotonic() + 20
        while not events:
            assert time.monotonic() < deadline
            listening.transport.poll(0.01)
            events = connecting.poll(0.01)
        assert events == [Connected(connection)]
    finally:
        connecting.close()
        listening.transport.close()


def test_with_tls_it_is_refused_by_name(directory):
    tls = mutual_tls(directory / "tls", Authority(), "kvdaemon.infinite-llm")
    with pytest.raises(ConfigError, match="rdma data plane has no TLS"):
        connecting_transport("rdma", None, tls)
    options = ListenOptions(directory / "shm", "127.0.0.1:0", None, False, tls)
    with pytest.raises(ConfigError, match="rdma data plane has no TLS"):
        listening_transport(("shm", "rdma"), options, None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"something else" * 10,
        Introduction(LIMITS, 1, 4096, "0" * 32, b"no description", b"").pack(),
        Introduction(LIMITS, 1, 4096, "0" * 32, b"", b"hello").pack() + b"more",
    ],
)
def test_who_cannot_be_written_to_is_turned_away(net, stranger, data):
    server, guest, control = stranger
    control.send([data])
    net.lost(guest, control)
    assert server.events == []


def test_who_never_introduces_himself_is_turned_away(net, stranger, monkeypatch, caplog):
    monkeypatch.setattr(rdma, "_INTRODUCTION_S", 0.2)
    server, guest, control = stranger
    net.lost(guest, control)
    assert "has not introduced itself within 0.2 s" in caplog.text
    monkeypatch.undo()
    near, far = net.link(net.station("client"), server)
    near.send([b"nobody else is"])
    net.arrive(server, far, 1)


@pytest.mark.parametrize(
    "note",
    [
        b"no note",
        Note(0, 0, 1 << 40, 8, 0).pack(),  # outside the memory
        Note(0, 0, 0, LIMITS.max_message_bytes + 1, 0).pack(),
        Note(0, 1 << 40, 0, 8, 0).pack(),  # far ahead
        Note(0, 0, 0, REPORT, 5).pack(),  # nothing has been sent to it
    ],
)
def test_impossible_notes_end_the_connection_only(net, note):
    client, server = net.station("client"), net.station("server")
    near, far = net.link(client, server)
    near.control.send([note])
    net.lost(server, far)
    net.lost(client, near)
    near, far = net.link(client, server)
    near.send([b"still here"])
    net.arrive(server, far, 1)
    assert server.take(far) == [b"still here"]
    assert len(server.of(Lost)) == 1


def test_introductions_are_read_as_written():
    introduction = Introduction(LIMITS, 7, 1 << 40, "a" * 32, b"description", b"hello")
    assert unpack_introduction(memoryview(introduction.pack())) == introduction
