"""The transport over torch.distributed: what peers may not say, what a lost group ends, and what is left behind."""

import struct
import threading

import pytest
import torch
from authority import Authority, mutual_tls
from stations import DEADLINE_S, LIMITS, CollectiveBackend, CompositeBackend, Net, TcpBackend

from services.core.errors import ConfigError, PeerLostError
from services.dataplane import collective
from services.dataplane.collective import CollectiveTransport
from services.dataplane.collective_control import Notice, Terms, control_limits, pack_notice, pack_terms
from services.dataplane.collective_group import GlooBackend, NcclBackend
from services.dataplane.collective_meeting import Meeting
from services.dataplane.select import ListenOptions, connecting_transport, listening_transport
from services.dataplane.tcp import TcpTransport
from services.dataplane.transport import Accepted, Connected, Limits, Lost


@pytest.fixture
def gloo_net(directory):
    net = Net(CollectiveBackend(directory))
    yield net
    net.close()


@pytest.fixture
def stranger(gloo_net):
    """A tcp transport that says what it likes to a gloo station: answers the server, and how to connect to it."""
    server = gloo_net.station("server")
    transport = TcpTransport()

    def connect(limits=LIMITS):
        return transport.connect(server.address.replace("gloo:", "tcp:"), b"hello", control_limits(limits))

    yield server, transport, connect
    transport.close()


def wait_for_loss(server, transport):
    """Polls both until the stranger's connection has ended."""
    for _ in range(int(DEADLINE_S / 0.01)):
        server.poll(0.005)
        if any(isinstance(event, Lost) for event in transport.poll(0.005)):
            return
    raise AssertionError("the connection did not end in time")


@pytest.mark.parametrize(
    "terms",
    [
        b"",
        bytes(42),
        pack_terms(Terms("nccl", LIMITS, 1, 1)),
        pack_terms(Terms("gloo", LIMITS, 1, 1))[:16] + struct.pack("<QQQH", 2, 1, 1, 1),
    ],
    ids=["empty", "nonsense", "backend", "limits"],
)
def test_a_guest_with_impossible_terms_is_turned_away(stranger, terms, caplog):
    server, transport, connect = stranger
    connect().send([terms])
    wait_for_loss(server, transport)
    assert server.events == []
    assert "turned away a guest" in caplog.text


def test_a_guest_without_terms_is_turned_away(stranger, monkeypatch):
    monkeypatch.setattr(collective, "_TERMS_TIMEOUT_S", 0.05)
    server, transport, connect = stranger
    connect()
    wait_for_loss(server, transport)
    assert server.events == []


@pytest.mark.parametrize(
    ("notice", "reason"),
    [
        (b"short", "notice"),
        (pack_notice(Notice(LIMITS.max_message_bytes + 1, 0)), "length"),
        (pack_notice(Notice(None, 1)), "freed"),
    ],
)
def test_impossible_notices_end_the_connection(gloo_net, stranger, notice, reason):
    server, _, connect = stranger
    side = connect()
    side.send([pack_terms(Terms("gloo", LIMITS, 1, 1))])
    side.send([notice])
    gloo_net.pump(lambda: server.of(Lost))
    assert [type(event) for event in server.events] == [Accepted, Lost]
    assert reason in server.of(Lost)[0].reason
    with pytest.raises(PeerLostError):
        server.events[0].connection.send([b"x"])


def test_a_message_that_memory_does_not_hold_ends_the_connection(gloo_net, stranger):
    server, _, connect = stranger
    side = connect()
    side.send([pack_terms(Terms("gloo", Limits(1 << 60, 1 << 60), 1, 1))])
    side.send([pack_notice(Notice(1 << 60, 0))])
    gloo_net.pump(lambda: server.of(Lost))
    assert "no memory" in server.of(Lost)[0].reason


def test_a_message_announced_and_never_sent_ends_with_its_sender(gloo_net, stranger):
    """A peer that nobody can meet holds up nobody: not the messages of others, and not its own end."""
    server, transport, connect = stranger
    side = connect()
    side.send([pack_terms(Terms("gloo", LIMITS, 1, 1))])
    side.send([pack_notice(Notice(100, 0))])
    gloo_net.pump(lambda: server.of(Accepted))
    client = gloo_net.station("client")
    near, far = gloo_net.link(client, server)
    near.send([b"from another"])
    gloo_net.pump(lambda: server.messages(far))
    assert server.take(far) == [b"from another"]
    transport.close()
    gloo_net.pump(lambda: server.of(Lost))
    assert server.of(Lost)[0].connection is server.of(Accepted)[0].connection
    near.send([b"and again"])
    gloo_net.pump(lambda: server.messages(far))


def test_a_broken_group_ends_its_connection_and_no_other(gloo_net):
    client, server = gloo_net.station("client"), gloo_net.station("server")
    near, far = gloo_net.link(client, server)
    near2, far2 = gloo_net.link(client, server)
    near.send([b"1"])
    near2.send([b"2"])
    gloo_net.pump(lambda: len(server.messages()) == 2)
    far._incoming._group.abort()
    near.send([b"into the broken group"])
    gloo_net.lost(server, far)
    gloo_net.lost(client, near)
    near2.send([b"3"])
    gloo_net.pump(lambda: len(server.messages(far2)) == 2)
    assert server.take(far2) == [b"2", b"3"]


def test_generations_do_not_meet():
    """Who comes for an earlier connection at the same store waits for nobody, until that is aborted."""
    ours = Meeting.called("127.0.0.1", 1, generation=2)
    late = Meeting(1, ours.host, ours.port, generation=1)
    peer = Meeting(1, ours.host, ours.port, generation=2)
    aborted, groups, failures = threading.Event(), {}, []

    def come(name, meeting):
        try:
            groups[name] = meeting.group(0, GlooBackend(), aborted)
        except RuntimeError as error:
            failures.append((name, str(error)))

    threads = {
        name: threading.Thread(target=come, args=(name, meeting))
        for name, meeting in (("late", late), ("ours", ours), ("peer", peer))
    }
    for thread in threads.values():
        thread.start()
    threads["ours"].join(DEADLINE_S)
    threads["peer"].join(DEADLINE_S)
    assert set(groups) == {"ours", "peer"}
    aborted.set()
    threads["late"].join(DEADLINE_S)
    assert failures == [("late", "the meeting has been aborted")]


def test_a_transport_that_is_closed_leaves_no_threads(gloo_net):
    before = set(threading.enumerate())
    client, server = gloo_net.station("client"), gloo_net.station("server")
    ends = [gloo_net.link(client, server) for _ in range(3)]
    for near, far in ends:
        near.send([b"x"])
        gloo_net.pump(lambda far=far: server.messages(far))
    begun = set(threading.enumerate()) - before
    assert len(begun) == 12  # two for each end
    gloo_net.close()
    for thread in begun:
        thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in begun)


def test_a_peer_that_takes_nothing_keeps_no_thread(gloo_net):
    """A transfer that nobody receives is aborted some time after the connection has been closed."""
    client, server = gloo_net.station("client"), gloo_net.station("server")
    near, _ = gloo_net.link(client, server)
    gloo_net.pump(lambda: near._outgoing._group and near._incoming._group)
    near.send([b"never received"])
    near.close()
    for lane in (near._outgoing, near._incoming):
        lane.thread.join(DEADLINE_S)
        assert not lane.thread.is_alive()


def test_together_with_another_transport(directory):
    net = Net(CompositeBackend(CollectiveBackend(directory), TcpBackend(directory)))
    try:
        client, server = net.station("client"), net.station("server")
        near, far = net.link(client, server)
        near.send([b"to and"])
        net.pump(lambda: server.messages(far))
        far.send([b"fro"])
        net.pump(lambda: client.messages(near))
        assert (server.take(far), client.take(near)) == ([b"to and"], [b"fro"])
    finally:
        net.close()


def test_chosen_by_configuration(directory):
    options = ListenOptions(directory / "shm", "127.0.0.1:0", None, allow_insecure=False)
    listening = listening_transport(("shm", "gloo"), options, None)
    connecting = connecting_transport("gloo", None)
    try:
        connection = connecting.connect(listening.offers.addresses[1], b"", Limits(100, 1000))
        events = []
        while not events:
            listening.transport.poll(0.01)
            events = connecting.poll(0.01)
        assert events == [Connected(connection)]
    finally:
        connecting.close()
        listening.transport.close()


def test_what_it_cannot_do_is_refused(directory):
    with pytest.raises(ConfigError, match="gloo data plane has no TLS"):
        connecting_transport("gloo", None, mutual_tls(directory / "tls", Authority(), "kvdaemon.infinite-llm"))
    only_connects = CollectiveTransport(GlooBackend())
    with pytest.raises(ConfigError, match=r"gloo:127\.0\.0\.1:7000"):
        only_connects.connect("gloo:", b"", LIMITS)
    with pytest.raises(ConfigError, match="no address"):
        only_connects.listen()
    only_connects.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_nccl_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="nccl transport needs"):
        NcclBackend(torch.device("cuda"))
