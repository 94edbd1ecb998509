"""The tcp transport with TLS: who gets in, what is refused for which reason, what is on the wire, and rotation.

What it has in common with the other transports is in test_conformance.py, test_processes.py and test_tcp.py.
"""

import contextlib
import logging
import os
import random
import socket
import ssl
import threading
import time

import pytest
from authority import Authority, SecretDirectory, mutual_tls
from cryptography import x509
from stations import LIMITS, Net, ShmBackend, Station, TlsBackend

from services.core.errors import ConfigError
from services.dataplane import reception, tcp, tcp_frames, tcp_tls
from services.dataplane.composite import CompositeTransport
from services.dataplane.select import ListenOptions, connecting_transport, listening_transport
from services.dataplane.tcp import TcpTransport
from services.dataplane.tcp_frames import frame
from services.dataplane.tcp_greeting import ANSWER, pack_greeting
from services.dataplane.tcp_tls import TlsTcpTransport
from services.dataplane.tls_stream import _PIECE_BYTES, _pieces
from services.dataplane.transport import Accepted, Connected, Limits, Lost
from services.runtime.access import DATA_CALLERS, DATA_LISTENER
from services.runtime.tls import MutualTls

DAEMON, INSTANCE = "kvdaemon.infinite-llm", "instance.infinite-llm"
LONG_S = 20.0  # a poll that waits so long has missed something


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def net():
    net = Net(None)
    yield net
    net.close()


@pytest.fixture
def backend(directory):
    return TlsBackend(directory)


def station(net, transport):
    made = Station(transport)
    net.stations.append(made)
    return made


def client_of(net, tls, **options):
    return station(net, TlsTcpTransport(tls, "127.0.0.1:0", **options))


def place_of(server):
    _, host, port = server.address.split(":")
    return host, int(port)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


class Guest:
    """A stranger that speaks TLS by itself, while the stations are pumped."""

    def __init__(self, net, server, tls, name=DAEMON, context=None):
        self._net = net
        if context is None:
            context = ssl.create_default_context(cafile=tls.ca)
            context.load_cert_chain(tls.cert, tls.key)
        self._raw = socket.create_connection(place_of(server), timeout=10)
        self._raw.setblocking(False)
        self._raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.tls = context.wrap_socket(self._raw, server_hostname=name, do_handshake_on_connect=False)
        try:
            self.drive(self.tls.do_handshake)
        except ssl.SSLError:
            self.close()
            raise

    def drive(self, call, *arguments):
        answers = []

        def done():
            with contextlib.suppress(ssl.SSLWantReadError):
                answers.append(call(*arguments))
            return answers

        self._net.pump(done)
        return answers[0]

    def close(self):
        self.tls.close()


# ---------------------------------------------------------------- who is refused


@pytest.mark.parametrize(
    ("client", "server", "seen_by_client", "logged_by_server"),
    [
        ("foreign", DAEMON, "the peer refuses the connection: unknown ca", "certificate is not accepted"),
        ("expired", DAEMON, "the peer refuses the connection: certificate expired", "certificate has expired"),
        ("gateway.infinite-llm", DAEMON, "does not let in the role", "not for gateway.infinite-llm"),
        ("instance.other", DAEMON, "does not let in the role", "not for instance.other"),
        (INSTANCE, "foreign", "the peer's certificate is not accepted", "refuses the connection: unknown ca"),
        (INSTANCE, "expired", "not accepted: certificate has expired", "refuses the connection: certificate expired"),
        (INSTANCE, INSTANCE, f"Hostname mismatch.*{DAEMON}", "refuses the connection: bad certificate"),
        (INSTANCE, "kvdaemon.other", f"Hostname mismatch.*{DAEMON}", "refuses the connection: bad certificate"),
        ("plain", DAEMON, "the peer speaks TLS, and this process has none", "the peer does not speak TLS"),
        (INSTANCE, "plain", "the peer hung up in the TLS handshake; is TLS configured", "a guest speaks TLS, and this"),
    ],
)
def test_a_connection_that_is_refused_says_why(
    net, directory, authority, caplog, client, server, seen_by_client, logged_by_server
):
    def transport_of(side, kind, good):
        if kind == "plain":
            return TcpTransport("127.0.0.1:0")
        if kind in ("foreign", "expired"):
            signer = Authority("foreign") if kind == "foreign" else authority
            tls = mutual_tls(directory / side, signer, good, expired=kind == "expired")
            # It trusts the other side; the other side must refuse.
            return TlsTcpTransport(MutualTls(trusted, tls.cert, tls.key), "127.0.0.1:0")
        return TlsTcpTransport(mutual_tls(directory / side, authority, kind), "127.0.0.1:0")

    trusted = mutual_tls(directory / "trusted", authority, "nobody").ca
    near_end = station(net, transport_of("client", client, INSTANCE))
    far_end = station(net, transport_of("server", server, DAEMON))
    connection = near_end.transport.connect(far_end.address, b"hello", LIMITS)
    connection.send([b"early"])
    reason = net.lost(near_end, connection)
    net.pump(lambda: "turned away a guest" in caplog.text)
    assert_matches(seen_by_client, reason)
    assert_matches(logged_by_server, caplog.text)
    assert near_end.of(Connected) == []
    assert far_end.events == []


def assert_matches(pattern, text):
    before, _, after = pattern.partition(".*")
    assert before in text, text
    assert after in text, text


@pytest.mark.parametrize("role", ["gateway", "gmanager", "instance", "kvdaemon", "client"])
def test_who_may_connect_stands_in_a_table(net, directory, authority, role):
    assert DATA_LISTENER == "kvdaemon"
    client = client_of(net, mutual_tls(directory / "client", authority, f"{role}.infinite-llm"))
    server = client_of(net, mutual_tls(directory / "server", authority, DAEMON))
    connection = client.transport.connect(server.address, b"", LIMITS)
    net.pump(lambda: client.events)
    assert [type(event) for event in client.events] == [Connected if role in DATA_CALLERS else Lost]
    assert client.events[0].connection is connection
    assert len(server.of(Accepted)) == (role in DATA_CALLERS)


def test_a_guest_without_a_certificate_or_with_an_old_protocol(net, directory, authority, caplog):
    tls = mutual_tls(directory / "server", authority, DAEMON)
    server = client_of(net, tls)
    anonymous = ssl.create_default_context(cafile=tls.ca)
    guest = Guest(net, server, tls, context=anonymous)  # it learns of the refusal when it reads
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
        guest.drive(guest.tls.recv, 1)
    guest.close()
    net.pump(lambda: "shows no certificate" in caplog.text)
    old = ssl.create_default_context(cafile=tls.ca)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        Guest(net, server, tls, context=old)
    assert "unsupported protocol" in caplog.text
    assert server.events == []


def test_refusals_disturb_nobody_and_leave_nothing(net, directory, authority, monkeypatch):
    monkeypatch.setattr(tcp, "FAREWELL_S", 0.1)
    monkeypatch.setattr(reception, "_GREETING_TIMEOUT_S", 0.3)
    tls = mutual_tls(directory / "server", authority, DAEMON)
    server, client = client_of(net, tls), client_of(net, tls)
    near, far = net.link(client, server)
    before = descriptors()
    context = ssl.create_default_context(cafile=tls.ca)
    silent = socket.create_connection(place_of(server))
    halfway = socket.create_connection(place_of(server))
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=DAEMON).do_handshake()
    halfway.sendall(outgoing.read()[:100])
    for content in (b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\x16\x03\x01" + bytes(600)):
        with socket.create_connection(place_of(server)) as stranger:
            stranger.sendall(content)
            near.send([b"undisturbed"])
            net.arrive(server, far, 1)
            server.take(far)
    for guest in (silent, halfway):
        guest.setblocking(False)

        def hung_up(guest=guest):
            try:
                return guest.recv(1000) == b""
            except BlockingIOError:
                return False
            except ConnectionResetError:  # what it had sent was not even read in time
                return True

        net.pump(hung_up)
        guest.close()
    net.pump(lambda: descriptors() == before)
    assert len(server.of(Accepted)) == 1


def test_a_listener_that_says_nothing_is_lost_in_time(net, directory, authority):
    client = client_of(net, mutual_tls(directory / "client", authority, INSTANCE), peer_timeout_s=0.3)
    before = descriptors()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connection = client.transport.connect(f"tcp:127.0.0.1:{silent.getsockname()[1]}", b"", LIMITS)
        connection.send([b"early"])
        begin = time.monotonic()
        events = client.transport.poll(LONG_S)
        assert 0.2 < time.monotonic() - begin < LONG_S / 2
    assert [type(event) for event in events] == [Lost]
    assert "has not accepted the connection within 0.3 s" in events[0].reason
    assert descriptors() == before


def test_a_peer_that_shakes_hands_and_says_nothing_else_is_lost_in_time(net, directory, authority):
    tls = mutual_tls(directory / "both", authority, DAEMON)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.ca)
    context.load_cert_chain(tls.cert, tls.key)
    client = client_of(net, tls, peer_timeout_s=0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = client.transport.connect(f"tcp:127.0.0.1:{listener.getsockname()[1]}", b"", LIMITS)
        accepted, _ = listener.accept()
        accepted.setblocking(False)
        with context.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False) as peer:

            def shaken():
                with contextlib.suppress(ssl.SSLWantReadError):
                    peer.do_handshake()
                    return True
                return False

            net.pump(shaken)
            assert client.of(Lost) == []
            assert "has not accepted" in net.lost(client, connection)


def test_a_connection_stays_when_it_has_been_accepted(net, directory, authority):
    tls = mutual_tls(directory / "both", authority, DAEMON)
    client, server = client_of(net, tls, peer_timeout_s=1.5), client_of(net, tls)
    near, far = net.link(client, server)
    until = time.monotonic() + 2
    while time.monotonic() < until:
        assert client.poll(0.1) == []
    near.send([b"later"])
    net.arrive(server, far, 1)


# ---------------------------------------------------------------- what is transferred


@pytest.fixture(params=["tls", "composite"])
def pair(request, net, backend, directory):
    """Two stations, of which the one that reads may wait for several transports."""
    reading = backend.new("server")
    if request.param == "composite":
        reading = CompositeTransport([reading, ShmBackend(directory).new("server")])
    return station(net, backend.new("client")), station(net, reading)


def test_bytes_that_the_socket_tells_nothing_of_are_served(net, pair, monkeypatch):
    """Every read takes 100 bytes of a record that has been decrypted as a whole: no poll may wait in between."""
    client, server = pair
    near, far = net.link(client, server)
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


def test_frames_that_come_in_the_record_of_the_greeting(net, pair, backend):
    _, server = pair
    guest = Guest(net, server, backend.tls)
    contents = [b"first", bytes(5000), b"last"]
    frames = b"".join(b"".join(frame([content], len(content), 0)) for content in contents)
    guest.drive(guest.tls.send, pack_greeting(b"", LIMITS) + frames)
    while len(server.messages()) < len(contents):
        assert server.poll(LONG_S), "the server waited in vain"
    assert server.take() == contents
    assert guest.drive(guest.tls.recv, 100) == ANSWER
    guest.close()


def test_large_messages_through_small_buffers(net, backend, monkeypatch):
    """The kernel takes a little at a time, of the handshake too; both ways at once, and parts are reused at once."""
    client, server = station(net, backend.new("client")), station(net, backend.new("server"))
    open_connection = tcp.open_connection

    def narrow(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        return sock

    monkeypatch.setattr(tcp, "open_connection", lambda *arguments: narrow(open_connection(*arguments)))
    narrow(server.transport._listener)
    size = 3 << 20
    near, far = net.link(client, server, Limits(size, 2 * size), hello=bytes(60_000))
    contents = [random.Random(number).randbytes(size - number) for number in range(2)]
    for content in contents:
        part = bytearray(content)
        for sender in (near, far):
            sender.send([memoryview(part)[:1000], memoryview(part)[1000:]])
        part[:] = bytes(len(part))
        client.poll()
    net.pump(lambda: len(server.messages(far)) == len(client.messages(near)) == 2)
    assert server.take(far) == contents
    assert client.take(near) == contents
    near.send([contents[0]])
    near.close()  # the rest of it goes out yet
    net.lost(server, far)
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
def test_what_is_on_the_wire(net, backend, scheme):
    new = backend.new if scheme == "tls" else lambda _: TcpTransport("127.0.0.1:0")
    client, server = station(net, new("client")), station(net, new("server"))
    with contextlib.closing(Proxy(place_of(server))) as proxy:
        near = client.transport.connect(proxy.address, b"the hello itself", LIMITS)
        near.send([b"the secret itself"])
        net.pump(server.messages)
        for text in (b"the hello itself", b"the secret itself"):
            assert (text in proxy.recorded) is (scheme == "tcp")


def test_a_byte_changed_on_its_way_ends_the_connection(net, backend):
    client, server = station(net, backend.new("client")), station(net, backend.new("server"))
    with contextlib.closing(Proxy(place_of(server))) as proxy:
        near = client.transport.connect(proxy.address, b"", LIMITS)
        net.pump(lambda: client.of(Connected))
        proxy.flip = True
        near.send([b"changed"])
        far = server.of(Accepted)[0].connection
        assert "bad record mac" in net.lost(server, far)
        assert server.messages() == []


def test_a_stream_that_somebody_has_cut_is_not_taken_for_its_end(net, backend):
    client, server = station(net, backend.new("client")), station(net, backend.new("server"))
    with contextlib.closing(Proxy(place_of(server))) as proxy:
        client.transport.connect(proxy.address, b"", LIMITS)
        net.pump(lambda: client.of(Connected))
        proxy.cut()
        assert "without a farewell" in net.lost(server, server.of(Accepted)[0].connection)
    near, far = net.link(client, server)
    near.close()
    assert net.lost(server, far) == "the peer hung up"


def test_a_peer_that_says_that_nothing_follows_is_heard_to_the_end(net, backend):
    """Its last message and its farewell are read at once; its socket stays open and says nothing more."""
    server = station(net, backend.new("server"))
    guest = Guest(net, server, backend.tls)
    guest.drive(guest.tls.send, pack_greeting(b"", LIMITS))
    assert guest.drive(guest.tls.recv, len(ANSWER)) == ANSWER
    guest.tls.send(b"".join(frame([b"last"], 4, 0)))
    with contextlib.suppress(ssl.SSLWantReadError):
        guest.tls.unwrap()
    while not server.of(Lost):
        assert server.poll(LONG_S), "the server waited in vain"
    assert server.take() == [b"last"]
    guest.close()


# ---------------------------------------------------------------- certificates


def shown_serial(net, server, tls):
    guest = Guest(net, server, tls)
    shown = guest.tls.getpeercert(binary_form=True)
    guest.close()
    return x509.load_der_x509_certificate(shown).serial_number


def test_rotation(net, directory):
    """From one authority to another: what stands goes on, what comes anew shows the new certificates."""
    old, new = Authority("old"), Authority("new")
    ours, theirs = SecretDirectory(directory / "client"), SecretDirectory(directory / "server")
    left_behind = mutual_tls(directory / "left", old, INSTANCE)
    ours.put(old.issue(INSTANCE), old.pem)
    theirs.put(old.issue(DAEMON), old.pem)
    client, server = client_of(net, ours.tls), client_of(net, theirs.tls)
    left = client_of(net, left_behind)
    near, far = net.link(client, server)
    bundle = old.pem + new.pem
    for signer, trusted in ((old, bundle), (new, bundle), (new, new.pem)):
        leaf = signer.issue(DAEMON)
        ours.put(signer.issue(INSTANCE), trusted)
        theirs.put(leaf, trusted)
        assert shown_serial(net, server, ours.tls) == leaf.serial
        again, _ = net.link(client, server)
        again.close()
        near.send([b"goes on"])
        net.arrive(server, far, 1)
        assert server.take(far) == [b"goes on"]
    reason = net.lost(left, left.transport.connect(server.address, b"", LIMITS))
    assert "not accepted" in reason  # it does not know the new authority either


def test_a_rotation_that_is_half_written_waits(net, directory, authority, caplog):
    first, second = authority.issue(DAEMON), authority.issue(DAEMON)
    files = SecretDirectory(directory / "server")
    files.put(first, authority.pem)
    tls = mutual_tls(directory / "client", authority, INSTANCE)
    server, client = client_of(net, files.tls), client_of(net, tls)
    (files.path / "tls.crt").resolve().write_bytes(second.cert)  # by hand, one file after the other
    assert shown_serial(net, server, tls) == first.serial
    assert "certificates not reloaded, the old ones stay in use" in caplog.text
    net.link(client, server)
    net.link(server, server)  # its own connecting side waits, too
    with caplog.at_level(logging.INFO):
        (files.path / "tls.key").resolve().write_bytes(second.key)
        assert shown_serial(net, server, tls) == second.serial
    assert "certificates reloaded" in caplog.text
    (files.path / "ca.crt").resolve().unlink()
    assert shown_serial(net, server, tls) == second.serial


def test_files_that_are_of_no_use_are_refused_at_start(directory, authority):
    good, other = (mutual_tls(directory / name, authority, DAEMON) for name in ("good", "other"))
    nothing = directory / "nothing"
    nothing.write_text("no certificate")
    for tls, message in (
        (MutualTls(good.ca, good.cert, other.key), "do not go together"),
        (MutualTls(good.ca, good.cert, directory / "none"), "none cannot be read"),
        (MutualTls(nothing, good.cert, good.key), "nothing is no file of trusted certificates"),
    ):
        with pytest.raises(ConfigError, match=message):
            connecting_transport("tcp", None, tls)


def test_the_data_plane_of_a_configuration(net, directory, authority):
    """With TLS it may listen where other hosts reach it; over shared memory nothing changes."""
    tls = mutual_tls(directory / "tls", authority, DAEMON)
    options = ListenOptions(directory / "socket", "0.0.0.0:0", "127.0.0.1", False, tls)
    daemon = listening_transport(("shm", "tcp"), options, "100gbit,1us")
    net.stations.append(server := Station(daemon.transport))
    for scheme, address in zip(("shm", "tcp"), daemon.addresses, strict=True):
        instance = connecting_transport(scheme, "100gbit,1us", tls)
        connection = instance.connect(address, scheme.encode(), LIMITS)
        connection.send([scheme.encode()])
        net.pump(lambda instance=instance: instance.poll(0.001) is None or server.messages())
        assert server.take() == [scheme.encode()]
        instance.close()
    plain = TcpTransport()
    connection = plain.connect(daemon.addresses[1], b"", LIMITS)
    events = []
    net.pump(lambda: events.extend(plain.poll(0.001)) or events)
    assert isinstance(events[0], Lost)
    assert "the peer speaks TLS" in events[0].reason
    plain.close()


def test_one_context_serves_until_the_files_change(directory, authority, monkeypatch):
    files = SecretDirectory(directory / "files")
    files.put(authority.issue(DAEMON), authority.pem)
    context = tcp_tls.RotatedContext(files.tls, tcp_tls.client_context)
    first = context.current()
    assert context.current() is first
    files.put(authority.issue(DAEMON), authority.pem)
    second = context.current()
    assert second is not first
    assert context.current() is second
