"""What happens when the process at the other end of a connection dies, stops, or sends what nobody wants any more."""

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from signals import send_signal
from stations import BACKENDS, LIMITS, Net

from services.core.errors import PeerLostError
from services.dataplane.transport import Connected, Lost

PEER = Path(__file__).with_name("transport_peer.py")
# A flood breaks this window after seconds only: NIXL needs a while for the first message, and a busy machine longer.
FLOODED = replace(LIMITS, window_bytes=4 << 20)


@pytest.fixture(params=["shm", "tcp", "tls", "gloo", "rdma"])
def net(request, directory):
    net = Net(BACKENDS[request.param](directory))
    yield net
    net.close()


@pytest.fixture
def start(net):
    """Starts a peer process and answers it with its address."""
    processes = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def start(name, mode):
        process = subprocess.Popen(
            [sys.executable, PEER, net.backend.listen_at(name), mode],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.wait(10)
        process.stdout.close()


def connect(net, client, address, limits=LIMITS):
    connection = client.transport.connect(address, b"test", limits)
    net.pump(lambda: client.of(Connected, connection))
    return connection


def echo(net, client, connection, content=b"echo"):
    connection.send([content])
    net.pump(lambda: client.messages(connection))
    assert client.take(connection) == [content]


def test_a_killed_peer_is_lost_in_the_middle_of_a_transfer(net, start):
    client = net.station("client")
    process, address = start("peer", "flood")
    connection = connect(net, client, address, FLOODED)
    net.pump(lambda: len(client.messages(connection)) > 5)
    process.kill()
    net.lost(client, connection)
    assert all(content == b"flood" * 1000 for content in client.take(connection))
    with pytest.raises(PeerLostError):
        connection.send([b"x"])


def test_a_peer_killed_before_it_accepts_is_lost(net, start):
    client = net.station("client")
    process, address = start("peer", "echo")
    send_signal(process.pid, signal.SIGSTOP)
    connection = client.transport.connect(address, b"", LIMITS)
    connection.send([b"x"])
    process.kill()
    net.lost(client, connection)
    assert client.of(Connected) == []


def test_a_stopped_peer_disturbs_nobody(net, start):
    client = net.station("client")
    stopped, stopped_address = start("stopped", "echo")
    _, address = start("other", "echo")
    silent = connect(net, client, stopped_address)
    other = connect(net, client, address)
    echo(net, client, silent)
    send_signal(stopped.pid, signal.SIGSTOP)
    for i in range(100):
        if i < 50:
            silent.send([bytes(5000)])
        echo(net, client, other, b"%d" % i * 100)
    late = client.transport.connect(stopped_address, b"", LIMITS)  # only its accept can take forever
    late.send([b"late"])
    assert client.messages(silent) == []
    stopped.send_signal(signal.SIGCONT)
    net.pump(lambda: len(client.messages(silent)) == 50 and client.messages(late))
    assert client.of(Lost) == []


def test_the_window_of_a_stopped_peer_ends_the_connection_only(net, start):
    client = net.station("client")
    stopped, address = start("stopped", "echo")
    connection = connect(net, client, address)
    send_signal(stopped.pid, signal.SIGSTOP)
    with pytest.raises(PeerLostError, match="window"):
        net.send_until_lost(client, connection, bytes(LIMITS.max_message_bytes), 100)
    net.lost(client, connection)
    stopped.send_signal(signal.SIGCONT)
    echo(net, client, connect(net, client, address))


def test_late_data_for_a_connection_given_up_reaches_nobody(net, start):
    client = net.station("client")
    flooding, flood_address = start("flood", "flood")
    given_up = connect(net, client, flood_address, FLOODED)
    net.pump(lambda: client.messages(given_up))
    view = client.messages(given_up)[0].data
    send_signal(flooding.pid, signal.SIGSTOP)
    given_up.close()
    client.events.clear()
    _, address = start("echo", "echo")
    fresh = connect(net, client, address)
    flooding.send_signal(signal.SIGCONT)
    for i in range(50):
        echo(net, client, fresh, random.Random(i).randbytes(5000))
    assert all(event.connection is fresh for event in client.events)
    assert bytes(view[:5]) == b"flood"  # memory of the connection given up, still mapped and nobody else's
