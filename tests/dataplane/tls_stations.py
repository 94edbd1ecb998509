"""Stations with TLS, and a peer that speaks TLS by itself."""

import contextlib
import socket
import ssl

from stations import Station

from services.dataplane.tcp_tls import TlsTcpTransport

DAEMON, INSTANCE = "kvdaemon.infinite-llm", "instance.infinite-llm"
LONG_S = 20.0  # a poll that waits so long has missed something


def station(net, transport):
    made = Station(transport)
    net.stations.append(made)
    return made


def client_of(net, tls, **options):
    return station(net, TlsTcpTransport(tls, "127.0.0.1:0", **options))


def place_of(server):
    _, host, port = server.address.split(":")
    return host, int(port)


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
