"""Which transport a pair uses: the best that both have, and shared memory only where it is proven to be shared."""

import importlib.util
import itertools
import os
import socket
import time

import pytest
from authority import Authority, mutual_tls
from stations import LIMITS, Net, Station

from kernels.cpu import find_library
from services.core.errors import ConfigError
from services.dataplane import negotiation, nixl
from services.dataplane.negotiation import Offers, choose_address, socket_identity, unpack_offers
from services.dataplane.select import ListenOptions, connecting_transport, listening_transport
from services.dataplane.transport import Connected
from services.dataplane.unix_socket import UnixListener

ALL = ("shm", "rdma", "tcp")
FAR = Offers(("shm:/nowhere/kv.data", "tcp:10.0.0.1:1", "rdma:10.0.0.1:2"), "another-boot/1/2")


@pytest.fixture
def listener(directory):
    listener = UnixListener(directory / "kv.data")
    yield listener
    listener.close()


def offers_of(listener):
    return Offers((f"shm:{listener.path}", "rdma:10.0.0.1:2", "tcp:10.0.0.1:1"), socket_identity(listener.path))


def test_the_best_that_both_have(listener):
    near = offers_of(listener)
    assert choose_address(ALL, near) == f"shm:{listener.path}"
    assert choose_address(ALL, FAR) == "rdma:10.0.0.1:2"
    assert choose_address(("shm", "tcp"), FAR) == "tcp:10.0.0.1:1"
    assert choose_address(ALL, Offers(FAR.addresses[:2], FAR.socket_identity)) == "tcp:10.0.0.1:1"
    assert choose_address(("tcp",), near) == "tcp:10.0.0.1:1"  # what is configured is obeyed


def test_the_same_path_is_not_the_same_socket(listener, directory, monkeypatch):
    """As in two containers of one machine, or on two machines that were set up alike."""
    near = offers_of(listener)
    os.rename(listener.path, directory / "moved")
    assert choose_address(ALL, near) == "rdma:10.0.0.1:2"  # nothing is there
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(directory / "kv.data"))
        assert choose_address(ALL, near) == "rdma:10.0.0.1:2"  # another's is there
    os.unlink(directory / "kv.data")
    os.rename(directory / "moved", listener.path)
    assert choose_address(ALL, near) == f"shm:{listener.path}"
    assert choose_address(ALL, Offers(near.addresses)) == "rdma:10.0.0.1:2"  # nothing is proven
    (directory / "boot").write_text("another-boot\n")
    monkeypatch.setattr(negotiation, "_BOOT_ID", directory / "boot")
    assert choose_address(ALL, near) == "rdma:10.0.0.1:2"  # another machine, and the same numbers by chance


def test_who_has_nothing_in_common_is_told_what_both_have(listener):
    with pytest.raises(ConfigError, match=r"over rdma, the daemon offers shm, tcp\. .*kvdaemon config: transports"):
        choose_address(("rdma",), Offers(("shm:/x", "tcp:10.0.0.1:1")))
    with pytest.raises(ConfigError, match=r"over shm, .* shm:/nowhere/kv\.data is not that daemon's socket here"):
        choose_address(("shm",), FAR)
    with pytest.raises(ConfigError, match="offers nothing"):
        choose_address(ALL, Offers())


@pytest.mark.parametrize("offers", [FAR, Offers(("tcp:10.0.0.1:1",)), Offers(("shm:/a b/c", "tcp:[::1]:1"), "b/1/2")])
def test_offers_are_read_as_written(offers):
    assert unpack_offers(offers.pack()) == offers


def test_auto_stands_for_what_is_worthwhile_here(directory, monkeypatch):
    tls = mutual_tls(directory / "tls", Authority(), "kvdaemon.infinite-llm")
    monkeypatch.setattr(nixl, "_ADAPTERS", directory)
    assert schemes_of("auto") == ("shm", "tcp")  # without an adapter rdma is slower than tcp
    (directory / "uverbs0").touch()
    assert schemes_of("auto", tls) == ("shm", "tcp")  # rdma has no TLS
    assert schemes_of("tcp") == ("tcp",)
    if importlib.util.find_spec("nixl_cu12") is not None:
        assert schemes_of("auto") == ("shm", "rdma", "tcp")
    monkeypatch.setattr(nixl, "_is_installed", lambda: False)
    assert schemes_of("auto") == ("shm", "tcp")


def schemes_of(choice, tls=None):
    transport = connecting_transport(choice, "100gbit,1us", tls)
    try:
        return transport.schemes
    finally:
        transport.close()


def test_transports_between_hosts_have_ports_of_their_own(directory):
    """tcp has the port that is configured, as before there were others."""
    listening, port = None, 0
    for port in itertools.count(20_000):
        options = ListenOptions(directory / "shm", f"127.0.0.1:{port}", None, False)
        try:
            listening = listening_transport(("shm", "gloo", "tcp"), options, None)
            break
        except ConfigError:
            assert port < 21_000
    listening.transport.close()
    assert listening.offers.addresses == (
        f"shm:{directory}/shm",
        f"gloo:127.0.0.1:{port + 1}",
        f"tcp:127.0.0.1:{port}",
    )


@pytest.mark.parametrize("link", [None, "100gbit,1us"])
@pytest.mark.parametrize("far", ["tcp", "rdma"])
def test_one_daemon_is_reached_over_shm_and_another_over_the_network_at_once(directory, far, link, monkeypatch):
    monkeypatch.setattr(nixl, "_ADAPTERS", directory)
    if far == "rdma":
        pytest.importorskip("nixl_cu12", reason="NIXL is not installed: pip install infinite-llm[rdma]")
        (directory / "uverbs0").touch()
    daemons = [
        listening_transport(("auto",), ListenOptions(directory / name, "127.0.0.1:0", None, False), link)
        for name in ("near", "far")
    ]
    os.unlink(directory / "far")  # as in another container
    net = Net(None)
    net.stations += [Station(daemon.transport) for daemon in daemons]
    instance = connecting_transport("auto", link)
    addresses = [choose_address(instance.schemes, daemon.offers) for daemon in daemons]
    assert [address.partition(":")[0] for address in addresses] == ["shm", far]
    connections = [instance.connect(address, address.encode(), LIMITS) for address in addresses]
    for connection, address in zip(connections, addresses, strict=True):
        connection.send([address.encode()])
    events, deadline = [], time.monotonic() + 20
    while len(events) < 2 or not all(station.messages() for station in net.stations):
        assert time.monotonic() < deadline
        events += instance.poll(0.01)
        for station in net.stations:
            station.poll(0)
    assert {event.connection for event in events if isinstance(event, Connected)} == set(connections)
    assert [station.take() for station in net.stations] == [[address.encode()] for address in addresses]
    if find_library() is not None:
        assert [connection.can_ask and connection.can_answer for connection in connections] == [True, far == "tcp"]
    instance.close()
    net.close()
