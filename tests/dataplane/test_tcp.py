"""The tcp transport: its ring, hostile peers, what it leaves behind, and where it may listen. With TLS: test_tls.py."""

import contextlib
import os
import random
import resource
import socket
import struct
from collections import deque

import numpy as np
import pytest
import torch
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st
from open_files import open_files
from stations import LIMITS

from services.core.errors import ConfigError, PeerLostError
from services.dataplane import reception, tcp
from services.dataplane.tcp import TcpTransport
from services.dataplane.tcp_frames import FrameReader, charge_of, frame, report
from services.dataplane.tcp_greeting import ANSWER, pack_greeting
from services.dataplane.transport import Accepted, Connected, Limits, Lost, Received, ReleaseHook


class Free(ReleaseHook):
    """Gives messages back to a reader."""

    def __init__(self, reader):
        self.reader = reader

    def __call__(self, message):
        self.reader.free(message)


@st.composite
def limits_and_steps(draw):
    longest = draw(st.integers(1, 700))
    window = longest + draw(st.integers(0, 2000))
    step = st.one_of(
        st.tuples(st.just("send"), st.integers(0, longest)),
        st.tuples(st.just("report"), st.just(0)),
        st.tuples(st.just("release"), st.integers(0, 1 << 30)),
        st.tuples(st.just("read"), st.integers(1, 1000)),
    )
    return Limits(longest, window), draw(st.lists(step, max_size=200))


@cases(150)
@given(limits_and_steps())
def test_the_ring_is_a_queue(case):
    """What is sent within the window arrives in order, intact and aligned, however it is cut and released."""
    limits, steps = case
    reader = FrameReader(limits)
    hook = Free(reader)
    sender, receiver = socket.socketpair()
    wire = bytearray()  # written and not yet given to the socket
    sent = deque()
    charged = 0
    held = []

    def read(most):
        sender.send(wire[:most])
        del wire[:most]
        reader.receive(receiver)
        while (message := reader.next(hook)) is not None:
            content = sent.popleft()
            if content:
                assert np.frombuffer(message.data, np.uint8).ctypes.data % 64 == 0
            held.append((message, content))

    with sender, receiver:
        for number, (kind, value) in enumerate(steps):
            outstanding = charged - reader.freed
            if kind == "send" and (not outstanding or outstanding + charge_of(value) <= limits.window_bytes):
                content = random.Random(number).randbytes(value)
                wire += b"".join(frame([content], value, 0))
                sent.append(content)
                charged += charge_of(value)
            elif kind == "report":
                wire += b"".join(report(0))
            elif kind == "read" and wire:
                read(value)
            elif kind == "release" and held:
                message, content = held.pop(value % len(held))
                assert bytes(message.data) == content
                message.release()
        while wire:
            read(997)
        assert not sent
        assert all(bytes(message.data) == content for message, content in held)


def stranger(server):
    """A plain socket connected to a station."""
    _, host, port = server.address.split(":")
    guest = socket.create_connection((host, int(port)), timeout=10)
    guest.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return guest


GREETING = pack_greeting(b"", LIMITS)


def limits_of(max_message_bytes, window_bytes):
    return GREETING[:8] + struct.pack("<QQI", max_message_bytes, window_bytes, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"IFLLMTC9" + GREETING[8:],
        GREETING[:-4] + struct.pack("<I", 1 << 30),
        limits_of(0, 0),
        limits_of(2, 1),
        limits_of(1 << 63, 1 << 63),
        ANSWER * 10,
    ],
    ids=["http", "version", "hello", "no limits", "window", "vast limits", "answer"],
)
def test_unacceptable_guests_are_turned_away(tcp_net, data):
    client, server = tcp_net.station("client"), tcp_net.station("server")
    near, far = tcp_net.link(client, server)
    before = open_files()
    with stranger(server) as guest:
        guest.send(data)
        tcp_net.settle()
        with contextlib.suppress(ConnectionResetError):
            assert guest.recv(1) == b""
    assert open_files() <= before
    assert len(server.of(Accepted)) == 1
    near.send([b"undisturbed"])
    tcp_net.arrive(server, far, 1)


def test_a_greeting_in_pieces_and_frames_right_behind_it(tcp_net):
    server = tcp_net.station("server")
    hello = bytes(range(200))
    with stranger(server) as guest:
        for byte in pack_greeting(hello, LIMITS) + b"".join(frame([b"early"], 5, 0)):
            guest.send(bytes([byte]))
            server.poll(0.001)
        tcp_net.pump(server.messages)
        assert server.of(Accepted)[0].hello == hello
        assert server.take() == [b"early"]
        assert guest.recv(len(ANSWER)) == ANSWER
    tcp_net.pump(lambda: server.of(Lost))


def test_a_silent_guest_is_dropped(tcp_net, monkeypatch):
    monkeypatch.setattr(reception, "_GREETING_TIMEOUT_S", 0.0)
    server = tcp_net.station("server")
    with stranger(server) as guest:
        tcp_net.settle()
        assert guest.recv(1) == b""


def test_a_port_scanner_disturbs_nobody(tcp_net):
    server = tcp_net.station("server")
    before = open_files()
    for _ in range(30):
        guest = stranger(server)
        guest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves with a reset
        guest.close()
    with stranger(server) as guest:  # taken behind all of them
        guest.send(GREETING)
        tcp_net.pump(lambda: server.of(Accepted))
    tcp_net.pump(lambda: server.of(Lost) and open_files() <= before)
    assert [type(event) for event in server.events] == [Accepted, Lost]


@pytest.mark.parametrize("seed", range(20))
def test_a_peer_that_sends_garbage_is_lost(tcp_net, seed):
    choose = random.Random(seed)
    server, client = tcp_net.station("server"), tcp_net.station("client")
    near, far = tcp_net.link(client, server)
    with stranger(server) as guest:
        guest.send(GREETING)
        tcp_net.pump(lambda: len(server.of(Accepted)) == 2)
        hostile = server.of(Accepted)[1].connection
        garbage = bytearray(b"".join(b"".join(frame([bytes(n)], n, 0)) for n in choose.choices(range(5000), k=20)))
        for _ in range(choose.randrange(1, 10)):
            at = choose.choice((0, 8, choose.randrange(len(garbage) // 8) * 8))
            value = choose.choice((choose.randrange(1 << 64), choose.randrange(1 << 17), (1 << 64) - 1))
            garbage[at : at + 8] = value.to_bytes(8, "little")
        with contextlib.suppress(OSError):
            guest.sendall(garbage)
        tcp_net.settle()
    tcp_net.lost(server, hostile)
    assert all(len(message.data) <= LIMITS.max_message_bytes for message in server.messages(hostile))
    assert [type(event) for event in server.events if event.connection is hostile][-1] is Lost
    near.send([b"undisturbed"])
    tcp_net.arrive(server, far, 1)


def test_a_listener_of_another_protocol_is_no_peer(tcp_net):
    client = tcp_net.station("client")
    with socket.create_server(("127.0.0.1", 0)) as other:
        connection = client.transport.connect(f"tcp:127.0.0.1:{other.getsockname()[1]}", b"", LIMITS)
        accepted, _ = other.accept()
        with accepted:
            accepted.send(b"SSH-2.0-server\r\n")
            assert "protocol" in tcp_net.lost(client, connection)
    assert client.of(Connected) == []


def test_more_parts_than_one_system_call_takes(stream_net):
    client, server = stream_net.station("client"), stream_net.station("server")
    near, far = stream_net.link(client, server)
    near.send([b"%04d" % i for i in range(5000)])
    stream_net.arrive(server, far, 1)
    assert server.take(far) == [b"".join(b"%04d" % i for i in range(5000))]


def test_a_long_message_waits_for_nobody_else(stream_net):
    """The long one takes many turns; the short ones sent after it overtake it on another connection."""
    client, server = stream_net.station("client"), stream_net.station("server")
    long = Limits(32 << 20, 32 << 20)
    near, far = stream_net.link(client, server, long)
    near2, far2 = stream_net.link(client, server)
    content = random.Random(1).randbytes(long.max_message_bytes)
    near.send([content])
    near2.send([b"short"])
    stream_net.pump(server.messages)
    assert server.take(far2) == [b"short"]
    stream_net.arrive(server, far, 1)
    assert server.take(far) == [content]


def test_what_the_kernel_does_not_take_is_copied(stream_net):
    """A message larger than the socket's buffers: its parts may be reused at once, and close sends the rest of it."""
    client, server = stream_net.station("client"), stream_net.station("server")
    size = 24 << 20
    near, far = stream_net.link(client, server, Limits(size, size))
    content = bytearray(random.Random(2).randbytes(size))
    expected = bytes(content)
    far.send([b"unread"])
    near.send([memoryview(content)[: size // 2], memoryview(content)[size // 2 :]])
    content[:] = bytes(size)
    near.close()
    stream_net.lost(server, far)
    assert server.take(far) == [expected]


def test_views_outlive_the_connection(stream_net):
    client, server = stream_net.station("client"), stream_net.station("server")
    near, far = stream_net.link(client, server)
    near.send([np.arange(1000, dtype=np.float32).data])
    stream_net.arrive(server, far, 1)
    message = server.messages(far)[0]
    tensor = torch.frombuffer(message.data, dtype=torch.float32)
    assert tensor.data_ptr() % 64 == 0
    message.release()
    far.close()
    server.events.clear()
    del far, message
    assert tensor[999] == 999.0


def test_nothing_is_left_after_close(stream_net, monkeypatch):
    monkeypatch.setattr(tcp, "FAREWELL_S", 0.1)
    server = stream_net.station("server")
    before = open_files()
    for turn in range(4):
        client = stream_net.station("client")
        near, far = stream_net.link(client, server)
        near.send([b"held"])
        far.send([b"held"])
        client.transport.connect(server.address, b"", LIMITS)
        stream_net.pump(lambda client=client, far=far: client.messages() and server.messages(far))
        if turn % 2:
            near.close()
            stream_net.lost(server, far)
        client.transport.close()
        stream_net.stations.remove(client)
        far.close()
        stream_net.pump(lambda: open_files() <= before)
        server.events.clear()


def test_a_peer_that_ignores_a_farewell_is_left_alone(tcp_net, monkeypatch):
    monkeypatch.setattr(tcp, "FAREWELL_S", 0.1)
    server = tcp_net.station("server")
    before = open_files()
    with stranger(server) as guest:
        guest.send(GREETING)
        tcp_net.pump(lambda: server.of(Accepted))
        server.of(Accepted)[0].connection.close()
        assert len(open_files() - before) == 2
        tcp_net.pump(lambda: len(open_files() - before) == 1)  # the guest's own end


def test_running_out_of_file_descriptors_pauses_the_listener(stream_net, monkeypatch):
    monkeypatch.setattr(reception, "_ACCEPT_PAUSE_S", 0.05)
    server, client = stream_net.station("server"), stream_net.station("client")
    near = client.transport.connect(server.address, b"", LIMITS)
    spare = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(open_files()) + 20, hard))
    try:
        while True:
            try:
                spare.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        assert server.poll(0.01) == []
        with pytest.raises(PeerLostError, match="Too many open files"):
            client.transport.connect(server.address, b"", LIMITS)
    finally:
        for fd in spare:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    stream_net.pump(lambda: client.of(Connected, near))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("0.0.0.0:0",), "refusing to listen on 0.0.0.0:0 without TLS"),
        (("nonsense",), "host:port"),
        (("127.0.0.1:0", "a-name"), "numeric address"),
        (("0.0.0.0:0", None, True), "set the address"),
        ((), "no address to listen on"),
    ],
)
def test_where_it_does_not_listen(arguments, message):
    transport = TcpTransport(*arguments)
    with pytest.raises(ConfigError, match=message):
        transport.listen()
    transport.close()


def test_where_it_listens():
    any_address = TcpTransport("0.0.0.0:0", "127.0.0.1", allow_insecure=True)
    assert any_address.listen().startswith("tcp:127.0.0.1:")
    port = any_address.listen().rpartition(":")[2]
    second = TcpTransport(f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="in use"):
        second.listen()
    for transport in (any_address, second):
        transport.close()


def test_addresses_that_nobody_can_connect_to(stream_net):
    client = stream_net.station("client")
    before = open_files()
    for address in ("tcp:", "tcp:127.0.0.1", "tcp:somewhere:1", "shm:/path"):
        with pytest.raises(ConfigError):
            client.transport.connect(address, b"", LIMITS)
    with pytest.raises(PeerLostError, match="MiB of memory are available"):
        client.transport.connect(client.address, b"", Limits(1, 1 << 50))
    assert open_files() <= before


def test_a_window_is_reported_without_messages_the_other_way(stream_net):
    """Only frames without messages tell the sender of the room; it goes on for many windows."""
    client, server = stream_net.station("client"), stream_net.station("server")
    near, far = stream_net.link(client, server)
    for _ in range(200):
        near.send([bytes(LIMITS.max_message_bytes)])
        stream_net.arrive(server, far, 1)
        server.take(far)
    assert [event for event in client.events if isinstance(event, Received)] == []
