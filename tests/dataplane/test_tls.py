"""The tcp transport with TLS: who gets in, what is refused for which reason, and rotation.

What is transferred: test_tls_streams.py. What it has in common with other transports: test_conformance.py,
test_processes.py and test_tcp.py.
"""

import contextlib
import logging
import socket
import ssl
import time

import pytest
from authority import Authority, SecretDirectory, mutual_tls
from cryptography import x509
from open_files import open_files
from stations import LIMITS, Station
from tls_stations import DAEMON, INSTANCE, LONG_S, Guest, client_of, place_of, station

from services.core.errors import ConfigError
from services.dataplane import reception, tcp, tcp_tls
from services.dataplane.select import ListenOptions, connecting_transport, listening_transport
from services.dataplane.tcp import TcpTransport
from services.dataplane.tcp_tls import TlsTcpTransport
from services.dataplane.transport import Accepted, Connected, Lost
from services.runtime.access import DATA_CALLERS, DATA_LISTENER
from services.runtime.tls import MutualTls


@pytest.fixture(scope="module")
def authority():
    return Authority()


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
    any_net, directory, authority, caplog, client, server, seen_by_client, logged_by_server
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
    near_end = station(any_net, transport_of("client", client, INSTANCE))
    far_end = station(any_net, transport_of("server", server, DAEMON))
    connection = near_end.transport.connect(far_end.address, b"hello", LIMITS)
    connection.send([b"early"])
    reason = any_net.lost(near_end, connection)
    any_net.pump(lambda: "turned away a guest" in caplog.text)
    assert_matches(seen_by_client, reason)
    assert_matches(logged_by_server, caplog.text)
    assert near_end.of(Connected) == []
    assert far_end.events == []


def assert_matches(pattern, text):
    before, _, after = pattern.partition(".*")
    assert before in text, text
    assert after in text, text


@pytest.mark.parametrize("role", ["gateway", "gmanager", "instance", "kvdaemon", "client"])
def test_who_may_connect_stands_in_a_table(any_net, directory, authority, role):
    assert DATA_LISTENER == "kvdaemon"
    client = client_of(any_net, mutual_tls(directory / "client", authority, f"{role}.infinite-llm"))
    server = client_of(any_net, mutual_tls(directory / "server", authority, DAEMON))
    connection = client.transport.connect(server.address, b"", LIMITS)
    any_net.pump(lambda: client.events)
    assert [type(event) for event in client.events] == [Connected if role in DATA_CALLERS else Lost]
    assert client.events[0].connection is connection
    assert len(server.of(Accepted)) == (role in DATA_CALLERS)


def test_a_guest_without_a_certificate_or_with_an_old_protocol(any_net, directory, authority, caplog):
    tls = mutual_tls(directory / "server", authority, DAEMON)
    server = client_of(any_net, tls)
    anonymous = ssl.create_default_context(cafile=tls.ca)
    guest = Guest(any_net, server, tls, context=anonymous)  # it learns of the refusal when it reads
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
        guest.drive(guest.tls.recv, 1)
    guest.close()
    any_net.pump(lambda: "shows no certificate" in caplog.text)
    old = ssl.create_default_context(cafile=tls.ca)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        Guest(any_net, server, tls, context=old)
    assert "unsupported protocol" in caplog.text
    assert server.events == []


def test_refusals_disturb_nobody_and_leave_nothing(any_net, directory, authority, monkeypatch):
    monkeypatch.setattr(tcp, "FAREWELL_S", 0.1)
    monkeypatch.setattr(reception, "_GREETING_TIMEOUT_S", 0.3)
    tls = mutual_tls(directory / "server", authority, DAEMON)
    server, client = client_of(any_net, tls), client_of(any_net, tls)
    near, far = any_net.link(client, server)
    before = open_files()
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
            any_net.arrive(server, far, 1)
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

        any_net.pump(hung_up)
        guest.close()
    any_net.pump(lambda: open_files() <= before)
    assert len(server.of(Accepted)) == 1


def test_a_listener_that_says_nothing_is_lost_in_time(any_net, directory, authority):
    client = client_of(any_net, mutual_tls(directory / "client", authority, INSTANCE), peer_timeout_s=0.3)
    before = open_files()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connection = client.transport.connect(f"tcp:127.0.0.1:{silent.getsockname()[1]}", b"", LIMITS)
        connection.send([b"early"])
        begin = time.monotonic()
        events = client.transport.poll(LONG_S)
        assert 0.2 < time.monotonic() - begin < LONG_S / 2
    assert [type(event) for event in events] == [Lost]
    assert "has not accepted the connection within 0.3 s" in events[0].reason
    assert open_files() <= before


def test_a_peer_that_shakes_hands_and_says_nothing_else_is_lost_in_time(any_net, directory, authority):
    tls = mutual_tls(directory / "both", authority, DAEMON)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.ca)
    context.load_cert_chain(tls.cert, tls.key)
    client = client_of(any_net, tls, peer_timeout_s=0.5)
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

            any_net.pump(shaken)
            assert client.of(Lost) == []
            assert "has not accepted" in any_net.lost(client, connection)


def test_a_connection_stays_when_it_has_been_accepted(any_net, directory, authority):
    tls = mutual_tls(directory / "both", authority, DAEMON)
    client, server = client_of(any_net, tls, peer_timeout_s=1.5), client_of(any_net, tls)
    near, far = any_net.link(client, server)
    until = time.monotonic() + 2
    while time.monotonic() < until:
        assert client.poll(0.1) == []
    near.send([b"later"])
    any_net.arrive(server, far, 1)


# ---------------------------------------------------------------- certificates


def shown_serial(net, server, tls):
    guest = Guest(net, server, tls)
    shown = guest.tls.getpeercert(binary_form=True)
    guest.close()
    return x509.load_der_x509_certificate(shown).serial_number


def test_rotation(any_net, directory):
    """From one authority to another: what stands goes on, what comes anew shows the new certificates."""
    old, new = Authority("old"), Authority("new")
    ours, theirs = SecretDirectory(directory / "client"), SecretDirectory(directory / "server")
    left_behind = mutual_tls(directory / "left", old, INSTANCE)
    ours.put(old.issue(INSTANCE), old.pem)
    theirs.put(old.issue(DAEMON), old.pem)
    client, server = client_of(any_net, ours.tls), client_of(any_net, theirs.tls)
    left = client_of(any_net, left_behind)
    near, far = any_net.link(client, server)
    bundle = old.pem + new.pem
    for signer, trusted in ((old, bundle), (new, bundle), (new, new.pem)):
        leaf = signer.issue(DAEMON)
        ours.put(signer.issue(INSTANCE), trusted)
        theirs.put(leaf, trusted)
        assert shown_serial(any_net, server, ours.tls) == leaf.serial
        again, _ = any_net.link(client, server)
        again.close()
        near.send([b"goes on"])
        any_net.arrive(server, far, 1)
        assert server.take(far) == [b"goes on"]
    reason = any_net.lost(left, left.transport.connect(server.address, b"", LIMITS))
    assert "not accepted" in reason  # it does not know the new authority either


def test_a_rotation_that_is_half_written_waits(any_net, directory, authority, caplog):
    first, second = authority.issue(DAEMON), authority.issue(DAEMON)
    files = SecretDirectory(directory / "server")
    files.put(first, authority.pem)
    tls = mutual_tls(directory / "client", authority, INSTANCE)
    server, client = client_of(any_net, files.tls), client_of(any_net, tls)
    (files.path / "tls.crt").resolve().write_bytes(second.cert)  # by hand, one file after the other
    assert shown_serial(any_net, server, tls) == first.serial
    assert "certificates not reloaded, the old ones stay in use" in caplog.text
    any_net.link(client, server)
    any_net.link(server, server)  # its own connecting side waits, too
    with caplog.at_level(logging.INFO):
        (files.path / "tls.key").resolve().write_bytes(second.key)
        assert shown_serial(any_net, server, tls) == second.serial
    assert "certificates reloaded" in caplog.text
    (files.path / "ca.crt").resolve().unlink()
    assert shown_serial(any_net, server, tls) == second.serial


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


def test_the_data_plane_of_a_configuration(any_net, directory, authority):
    """With TLS it may listen where other hosts reach it; over shared memory nothing changes."""
    tls = mutual_tls(directory / "tls", authority, DAEMON)
    options = ListenOptions(directory / "socket", "0.0.0.0:0", "127.0.0.1", False, tls)
    daemon = listening_transport(("shm", "tcp"), options, "100gbit,1us")
    any_net.stations.append(server := Station(daemon.transport))
    for scheme, address in zip(("shm", "tcp"), daemon.offers.addresses, strict=True):
        instance = connecting_transport(scheme, "100gbit,1us", tls)
        connection = instance.connect(address, scheme.encode(), LIMITS)
        connection.send([scheme.encode()])
        any_net.pump(lambda instance=instance: instance.poll(0.001) is None or server.messages())
        assert server.take() == [scheme.encode()]
        instance.close()
    plain = TcpTransport()
    connection = plain.connect(daemon.offers.addresses[1], b"", LIMITS)
    events = []
    any_net.pump(lambda: events.extend(plain.poll(0.001)) or events)
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
