"""The emulated link: never early, in order, and nothing lost between what is due and what is not."""

import threading
import time
from pathlib import Path

import pytest
from stations import BACKENDS, LIMITS, EmulatedBackend, Net

from services.core.errors import ConfigError
from services.dataplane.link import EmulatedLink, stamped_limits, unstamped_limits
from services.dataplane.link_spec import LinkSpec, parse_link
from services.dataplane.select import ListenOptions, connecting_transport, listening_transport
from services.dataplane.transport import Accepted, Connected, Limits, Lost, Received

LATENCY_S = 0.03
SIZE = 50_000
TRANSFER_S = 0.02  # of SIZE


class SlowBackend(EmulatedBackend):
    def new(self, name):
        return EmulatedLink(self.inner.new(name), LinkSpec(SIZE / TRANSFER_S, LATENCY_S))


@pytest.fixture(params=["loopback", "shm", "tcp", "tls", "composite-tcp"])
def net(request, directory):
    net = Net(SlowBackend(BACKENDS[request.param](directory)))
    yield net
    net.close()


@pytest.mark.parametrize(
    ("text", "bytes_per_s", "latency_s"),
    [
        ("25gbit,50us", 3.125e9, 50e-6),
        (" 1.5Gbit , 0.2 ms ", 187.5e6, 0.2e-3),
        ("100mbit,1s", 12.5e6, 1.0),
        ("8kbit,0us", 1000.0, 0.0),
    ],
)
def test_links_that_can_be_named(text, bytes_per_s, latency_s):
    spec = parse_link(text)
    assert spec.bytes_per_s == pytest.approx(bytes_per_s)
    assert spec.latency_s == pytest.approx(latency_s)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "25gbit,50us"),
        ("25gbit", "25gbit,50us"),
        ("25,50us", "'25' is no bandwidth"),
        ("25gbyte,50us", "kbit, mbit, gbit"),
        ("25gbit,50", "'50' is no latency"),
        ("25gbit,-5us", "'-5us' is no latency"),
        ("25gbit,50us,1", "no latency"),
        ("0gbit,50us", "must be positive"),
        ("infgbit,50us", "no bandwidth"),
    ],
)
def test_links_that_cannot(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_link(text)


def test_limits_are_the_same_on_both_sides():
    for window in (*range(1, 3000), 1 << 20, (1 << 20) + 255):
        limits = Limits(1, window)
        assert unstamped_limits(stamped_limits(limits)) == limits


def test_messages_take_the_links_time_and_keep_their_order(net):
    client, server = net.station("client"), net.station("server")
    near, far = net.link(client, server)
    begin = time.monotonic()
    arrived = []
    for number in range(4):
        near.send([bytes([number]) * SIZE])
    near.send([b"last"])
    while len(arrived) < 5:
        arrived += [(event.message.data[0], time.monotonic() - begin) for event in server.poll(1)]
    assert [first for first, _ in arrived] == [0, 1, 2, 3, ord("l")]
    for number, (_, after) in enumerate(arrived):
        assert after >= LATENCY_S + min(number + 1, 4) * TRANSFER_S
    assert client.of(Lost) == server.of(Lost) == []
    assert [event.connection for event in server.of(Received)] == [far] * 5


def test_both_directions_and_other_connections_are_links_of_their_own(net):
    """A message does not wait for those of the others, sent just before it."""
    client, server = net.station("client"), net.station("server")
    near, far = net.link(client, server)
    near2, far2 = net.link(client, server)
    for connection in (near, far, near2, far2):
        connection.send([bytes(SIZE)])
    sent_by = time.monotonic()
    net.pump(lambda: len(server.messages()) == len(client.messages()) == 2)
    assert all(connection.free_at <= sent_by + TRANSFER_S for connection in (near, far, near2, far2))


def test_time_that_nobody_looked_counts(net):
    """A message that was under way while its receiver computed is there when it is looked for."""
    client, server = net.station("client"), net.station("server")
    near, _ = net.link(client, server)
    near.send([b"x"])
    client.poll(0.001)
    time.sleep(2 * LATENCY_S)
    deadline = time.monotonic() + 20
    while not server.poll(0):
        assert time.monotonic() < deadline
    assert server.take() == [b"x"]


def test_the_end_comes_after_what_was_sent_before(net):
    client, server = net.station("client"), net.station("server")
    near = client.transport.connect(server.address, b"", LIMITS)
    begin = time.monotonic()
    near.send([bytes(SIZE)])
    near.close()
    net.pump(lambda: server.of(Lost))
    assert time.monotonic() - begin >= LATENCY_S + TRANSFER_S
    assert [type(event) for event in server.events] == [Accepted, Received, Lost]
    assert server.take() == [bytes(SIZE)]


def test_nothing_comes_of_a_connection_closed_meanwhile(net):
    client, server = net.station("client"), net.station("server")
    near, far = net.link(client, server)
    near.send([b"late"])
    net.settle()
    assert server.messages() == []
    far.close()
    time.sleep(LATENCY_S)
    net.settle()
    assert server.messages() == []
    net.lost(client, near)


def test_a_wait_for_a_message_under_way_can_be_ended(net):
    client, server = net.station("client"), net.station("server")
    near, _ = net.link(client, server)
    threading.Timer(LATENCY_S / 3, server.transport.wake).start()
    near.send([bytes(SIZE)])
    client.poll(0)
    server.poll(20)  # ended by wake or, on a busy machine, by the message
    net.pump(server.messages)


def test_a_peer_without_the_link_is_found_out(directory):
    net = Net(BACKENDS["tcp"](directory))
    plain = net.station("plain")
    slow = Net(SlowBackend(net.backend)).station("slow")
    net.stations.append(slow)
    near, far = net.link(plain, slow, stamped_limits(LIMITS))
    near.send([b"no stamp"])
    assert "configure the same link" in net.lost(slow, far)
    assert slow.messages() == []
    net.lost(plain, near)
    net.close()


def test_the_data_plane_of_a_configuration(directory):
    options = ListenOptions(Path(directory / "socket"), "127.0.0.1:0", None, False)
    daemon = listening_transport(("shm", "tcp"), options, "100gbit,1us")
    assert [address.partition(":")[0] for address in daemon.offers.addresses] == ["shm", "tcp"]
    for scheme, address in zip(("shm", "tcp"), daemon.offers.addresses, strict=True):
        instance = connecting_transport(scheme, "100gbit,1us")
        connection = instance.connect(address, scheme.encode(), LIMITS)
        events = []
        deadline = time.monotonic() + 20
        while not any(isinstance(event, Received) for event in events):
            assert time.monotonic() < deadline
            events += instance.poll(0.01)
            for event in daemon.transport.poll(0.01):
                if isinstance(event, Accepted):
                    event.connection.send([event.hello])
        assert [type(event) for event in events] == [Connected, Received]
        assert bytes(events[1].message.data) == scheme.encode()
        assert events[1].connection is connection
        instance.close()
    daemon.transport.close()
