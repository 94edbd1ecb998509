"""What goes over tcp with TLS: nothing is left lying in OpenSSL, and nothing is read or changed on its way."""

import contextlib
import random
import socket
import ssl
import threading
import time

import pytest
from stations import LIMITS, ShmBackend, TlsBackend
from tls_stations import LONG_S, Guest, place_of, station

from services.dataplane import tcp, tcp_frames
from services.dataplane.composite import CompositeTransport
from services.dataplane.tcp import TcpTransport
from services.dataplane.tcp_frames import frame
from services.dataplane.tcp_greeting import ANSWER, pack_greeting
from services.dataplane.tls_stream import _PIECE_BYTES, _pieces
from services.dataplane.transport import Accepted, Connected, Limits, Lost


@pytest.fixture
def backend(directory):
    return TlsBackend(directory)


@pytest.fixture(params=["tls", "composite"])
def pair(request, any_net, backend, directory):
    """Two stations, of which the one that reads may wait for several transports."""
    reading = backend.new("server")
    if request.param == "composite":
        reading = CompositeTransport([reading, ShmBackend(directory).new("server")])
    return station(any_net, backend.new("client")), station(any_net, reading)


def test_bytes_that_the_socket_tells_nothing_of_are_served(any_net, pair, monkeypatch):
    """Every read takes 100 bytes of a record that has been decrypted as a whole: no poll may wait in between."""
    client, server = pair
    near, far = any_net.link(client, server)
    monkeypatch.setattr(tcp_frames, "_READ_BYTES", 100)
    contents = [random.Random(size).randbytes(size) for size in (16_000, 0, 10_000, 1)]
    near.send([contents[0]])
    for content in contents[1:]:
        near.send([content])
    client.poll()
    begin = time.monotonic()
    while len(server.messages(far)) < len(contents):
        assert server.poll(LONG_S), "the server waited in vain"
    assert time.monotonic() - begin < LONG_S / 2
    assert server.take(far) == contents


def test_frames_that_come_in_the_record_of_the_greeting(any_net, pair, backend):
    _, server = pair
    guest = Guest(any_net, server, backend.tls)
    contents = [b"first", bytes(5000), b"last"]
    frames = b"".join(b"".join(frame([content], len(content), 0)) for content in contents)
    guest.drive(guest.tls.send, pack_greeting(b"", LIMITS) + frames)
    while len(server.messages()) < len(contents):
        assert server.poll(LONG_S), "the server waited in vain"
    assert server.take() == contents
    assert guest.drive(guest.tls.recv, 100) == ANSWER
    guest.close()


def test_large_messages_through_small_buffers(any_net, backend, monkeypatch):
    """The kernel takes a little at a time, of the handshake too; both ways at once, and parts are reused at once."""
    client, server = station(any_net, backend.new("client")), station(any_net, backend.new("server"))
    open_connection = tcp.open_connection

    def narrow(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        return sock

    monkeypatch.setattr(tcp, "open_connection", lambda *arguments: narrow(open_connection(*arguments)))
    narrow(server.transport._listener)
    size = 3 << 20
    near, far = any_net.link(client, server, Limits(size, 2 * size), hello=bytes(60_000))
    contents = [random.Random(number).randbytes(size - number) for number in range(2)]
    for content in contents:
        part = bytearray(content)
        for sender in (near, far):
            sender.send([memoryview(part)[:1000], memoryview(part)[1000:]])
        part[:] = bytes(len(part))
        client.poll()
    any_net.pump(lambda: len(server.messages(far)) == len(client.messages(near)) == 2)
    assert server.take(far) == contents
    assert client.take(near) == contents
    near.send([contents[0]])
    near.close()  # the rest of it goes out yet
    any_net.lost(server, far)
    assert server.take(far) == contents[:1]


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0],
        [1],
        [_PIECE_BYTES],
        [_PIECE_BYTES - 1, 1],
        [1, _PIECE_BYTES],
        [16, 3 * _PIECE_BYTES + 5, 0, 48],
        [7] * 9,
    ],
)
def test_pieces_are_the_bytes_in_order(sizes):
    buffers = [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]
    pieces = [bytes(piece) for piece in _pieces(buffers)]
    assert b"".join(pieces) == b"".join(buffers)
    assert all(len(piece) == _PIECE_BYTES for piece in pieces[:-1])


class Proxy:
    """Passes bytes on both ways between a client and an address, records them, and may change them on their way."""

    def __init__(self, place):
        self.recorded = bytearray()
        self.flip = False
        self._there = place
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        near, _ = self._listener.accept()
        far = socket.create_connection(self._there)
        self._sockets += [near, far]
        for source, sink in ((near, far), (far, near)):
            thread = threading.Thread(target=self._pass, args=(source, sink))
            self._threads.append(thread)
            thread.start()

    def _pass(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.recorded += data
                sink.sendall(data[:-1] + bytes([data[-1] ^ self.flip]))
            sink.shutdown(socket.SHUT_WR)

    def cut(self):
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.cut()
        for thread in self._threads:
            thread.join(10)
        for sock in self._sockets:
            sock.close()


@pytest.mark.parametrize("scheme", ["tcp", "tls"])
def test_what_is_on_the_wire(any_net, backend, scheme):
    new = backend.new if scheme == "tls" else lambda _: TcpTransport("127.0.0.1:0")
    client, server = station(any_net, new("client")), station(any_net, new("server"))
    with contextlib.closing(Proxy(place_of(server))) as proxy:
        near = client.transport.connect(proxy.address, b"the hello itself", LIMITS)
        near.send([b"the secret itself"])
        any_net.pump(server.messages)
        for text in (b"the hello itself", b"the secret itself"):
            assert (text in proxy.recorded) is (scheme == "tcp")


def test_a_byte_changed_on_its_way_ends_the_connection(any_net, backend):
    client, server = station(any_net, backend.new("client")), station(any_net, backend.new("server"))
    with contextlib.closing(Proxy(place_of(server))) as proxy:
        near = client.transport.connect(proxy.address, b"", LIMITS)
        any_net.pump(lambda: client.of(Connected))
        proxy.flip = True
        near.send([b"changed"])
        far = server.of(Accepted)[0].connection
        assert "bad record mac" in any_net.lost(server, far)
        assert server.messages() == []


def test_a_stream_that_somebody_has_cut_is_not_taken_for_its_end(any_net, backend):
    client, server = station(any_net, backend.new("client")), station(any_net, backend.new("server"))
    with contextlib.closing(Proxy(place_of(server))) as proxy:
        client.transport.connect(proxy.address, b"", LIMITS)
        any_net.pump(lambda: client.of(Connected))
        proxy.cut()
        assert "without a farewell" in any_net.lost(server, server.of(Accepted)[0].connection)
    near, far = any_net.link(client, server)
    near.close()
    assert any_net.lost(server, far) == "the peer hung up"


def test_a_peer_that_says_that_nothing_follows_is_heard_to_the_end(any_net, backend):
    """Its last message and its farewell are read at once; its socket stays open and says nothing more."""
    server = station(any_net, backend.new("server"))
    guest = Guest(any_net, server, backend.tls)
    guest.drive(guest.tls.send, pack_greeting(b"", LIMITS))
    assert guest.drive(guest.tls.recv, len(ANSWER)) == ANSWER
    guest.tls.send(b"".join(frame([b"last"], 4, 0)))
    with contextlib.suppress(ssl.SSLWantReadError):
        guest.tls.unwrap()
    while not server.of(Lost):
        assert server.poll(LONG_S), "the server waited in vain"
    assert server.take() == [b"last"]
    guest.close()
