"""The shm transport with real processes, hostile peers, and what it leaves behind."""

import contextlib
import fcntl
import mmap
import os
import random
import resource
import socket
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from open_files import open_files

from services.core.errors import ConfigError, PeerLostError
from services.dataplane import reception
from services.dataplane.memfd import available_bytes, create_memfd
from services.dataplane.shm import ShmTransport
from services.dataplane.shm_handshake import offer
from services.dataplane.shm_ring import RingLayout
from services.dataplane.transport import Accepted, Connected, Limits, Lost, Received

LIMITS = Limits(max_message_bytes=64 << 10, window_bytes=256 << 10)
GREETING = struct.Struct("<8sQQI")


def mapped_rings():
    """How many mappings of shared memory this process has."""
    return Path("/proc/self/maps").read_text().count("infinite-llm-rings")


def resources():
    return open_files(), mapped_rings()


def assert_nothing_is_left(before):
    files, rings = before
    assert open_files() <= files
    assert mapped_rings() <= rings


def test_views_outlive_the_connection(shm_net):
    """A tensor holds no buffer export, only a reference: memory must not go before it does."""
    client, server = shm_net.station("client"), shm_net.station("server")
    before = resources()
    near, far = shm_net.link(client, server)
    near.send([np.arange(1000, dtype=np.float32).data])
    shm_net.arrive(server, far, 1)
    data = server.messages(far)[0].data
    tensor = torch.frombuffer(data[64:], dtype=torch.float32)
    array = np.frombuffer(data, dtype=np.float32)
    assert array.ctypes.data % 64 == 0
    server.messages(far)[0].release()
    far.close()
    near.close()
    client.events.clear()
    server.events.clear()
    del near, far, data
    assert array[999] == tensor[999 - 16] == 999.0
    del array
    assert tensor[999 - 16] == 999.0
    del tensor
    assert_nothing_is_left(before)


def test_nothing_is_left_after_close(shm_net):
    server = shm_net.station("server")
    shm_net.link(shm_net.station("warm-up"), server)
    before = resources()
    for turn in range(5):
        client = shm_net.station("client")
        near, far = shm_net.link(client, server)
        near.send([b"held"])
        far.send([b"held"])
        pending = client.transport.connect(server.address, b"", LIMITS)
        shm_net.pump(lambda client=client, far=far: client.messages() and server.messages(far))
        if turn % 2:
            near.close()
            shm_net.lost(server, far)
        client.transport.close()
        shm_net.settle()
        server.take()
        far.close()
        client.events.clear()
        server.events.clear()
        shm_net.stations.remove(client)
        del client, near, far, pending
    assert_nothing_is_left(before)


def test_nothing_is_left_of_a_connection_that_failed(shm_net):
    client = shm_net.station("client")
    server = shm_net.station("server")
    before = resources()
    with pytest.raises(PeerLostError):
        client.transport.connect("shm:/nowhere/at/all", b"", LIMITS)
    with pytest.raises(PeerLostError, match="more than 107 bytes"):
        client.transport.connect(f"shm:/{'x' * 120}", b"", LIMITS)
    with pytest.raises(PeerLostError, match="MiB of memory are available"):
        client.transport.connect(server.address, b"", Limits(1, 1 << 50))
    with pytest.raises(ConfigError, match="shm:/path"):
        client.transport.connect("tcp:localhost:1", b"", LIMITS)
    shm_net.settle()
    assert_nothing_is_left(before)


def test_socket_files(directory):
    path = directory / "socket"
    first = ShmTransport(path)
    first.listen()
    second = ShmTransport(path)
    with pytest.raises(ConfigError, match="live process"):
        second.listen()
    first.close()
    assert not path.exists()
    # What a killed process leaves: a socket file that nobody listens on.
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert path.exists()
    second.listen()
    assert path.stat().st_mode & 0o777 == 0o600
    # A file that somebody else has put there meanwhile is not ours to remove.
    path.unlink()
    path.write_text("not a socket")
    second.close()
    third = ShmTransport(path)
    with pytest.raises(ConfigError, match="not a socket"):
        third.listen()
    third.close()
    assert path.read_text() == "not a socket"


def test_socket_paths_that_cannot_be(directory):
    for path, what in ((directory / ("x" * 120), "107"), (directory / "no" / "such", "No such file")):
        transport = ShmTransport(path)
        with pytest.raises(ConfigError, match=what):
            transport.listen()
        transport.close()
    transport = ShmTransport()
    with pytest.raises(ConfigError, match="no socket path"):
        transport.listen()
    transport.close()


def test_many_start_at_once_over_a_stale_socket(directory):
    """Exactly one of them listens."""
    path = directory / "socket"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    transports = [ShmTransport(path) for _ in range(8)]
    listening = []

    def listen(transport):
        try:
            transport.listen()
            listening.append(transport)
        except ConfigError:
            pass

    threads = [threading.Thread(target=listen, args=(transport,)) for transport in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(listening) == 1
    for transport in transports:
        transport.close()


def greeting(limits=LIMITS, hello_bytes=0, magic=b"IFLLMSH1"):
    return GREETING.pack(magic, limits.max_message_bytes, limits.window_bytes, hello_bytes)


def plain_memfd(size, seals=0):
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


TOTAL = RingLayout(LIMITS, 0).total_bytes
SHRINK_GROW = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@pytest.mark.parametrize(
    ("data", "memory"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", None),
        (greeting(magic=b"IFLLMSH9"), lambda: create_memfd("hostile", TOTAL)),
        (greeting(), None),
        (greeting(), lambda: os.open("/dev/zero", os.O_RDWR)),
        (greeting(), lambda: plain_memfd(TOTAL)),
        (greeting(), lambda: plain_memfd(TOTAL, SHRINK_GROW)),
        (greeting(), lambda: create_memfd("hostile", TOTAL - 4096)),
        (greeting(hello_bytes=1 << 30), lambda: create_memfd("hostile", TOTAL)),
        (struct.pack("<8sQQI", b"IFLLMSH1", 0, 0, 0), lambda: create_memfd("hostile", TOTAL)),
        (struct.pack("<8sQQI", b"IFLLMSH1", 1 << 63, 1 << 63, 0), lambda: create_memfd("hostile", TOTAL)),
    ],
    ids=["http", "version", "no fd", "device", "unsealed", "hollow", "short", "hello", "no limits", "vast limits"],
)
def test_unacceptable_guests_are_turned_away(shm_net, data, memory):
    client, server = shm_net.station("client"), shm_net.station("server")
    near, far = shm_net.link(client, server)
    before = open_files()
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(server.address.removeprefix("shm:"))
        guest.settimeout(10)
        if memory is None:
            guest.send(data)
        else:
            fd = memory()
            socket.send_fds(guest, [data], [fd])
            os.close(fd)
        shm_net.settle()
        with contextlib.suppress(ConnectionResetError):
            assert guest.recv(1) == b""
    assert open_files() <= before
    assert len(server.of(Accepted)) == 1
    near.send([b"undisturbed"])
    shm_net.arrive(server, far, 1)


def test_a_greeting_in_pieces(shm_net):
    server = shm_net.station("server")
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(server.address.removeprefix("shm:"))
        fd = create_memfd("slow", TOTAL)
        for i, byte in enumerate(greeting()):
            socket.send_fds(guest, [bytes([byte])], [fd] if i % 10 == 0 else [])
            shm_net.settle()
        os.close(fd)
        assert len(server.of(Accepted)) == 1
    shm_net.pump(lambda: server.of(Lost))


def test_a_silent_guest_is_dropped(shm_net, monkeypatch):
    monkeypatch.setattr(reception, "_GREETING_TIMEOUT_S", 0.0)
    server = shm_net.station("server")
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(server.address.removeprefix("shm:"))
        guest.setblocking(False)
        shm_net.settle()
        assert guest.recv(1) == b""


@pytest.mark.parametrize("seed", range(30))
def test_a_peer_that_writes_garbage_is_lost(shm_net, seed):
    """Counters, lengths and contents of a connected peer's memory are overwritten at random while both sides work."""
    choose = random.Random(seed)
    server, client = shm_net.station("server"), shm_net.station("client")
    near, far = shm_net.link(client, server)
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(server.address.removeprefix("shm:"))
        rings = offer(guest, b"", LIMITS)
        shm_net.pump(lambda: len(server.of(Accepted)) == 2)
        hostile = server.of(Accepted)[1].connection
        words = memoryview(rings.memory).cast("Q")
        sent = 0
        for _ in range(300):
            value = choose.choice((choose.randrange(1 << 64), choose.randrange(0, 1 << 20, 64), (1 << 64) - 1))
            words[choose.choice((0, 16, 32, 128, 144, 160, choose.randrange(len(words))))] = value
            guest.send(b"\1" * choose.randrange(1, 5))
            try:
                for _ in range(choose.randrange(3)):
                    hostile.send([bytes(choose.randrange(5000))])
                    sent += 1
            except PeerLostError:
                pass
            for event in server.poll():
                if isinstance(event, Received):
                    assert len(bytes(event.message.data)) <= LIMITS.max_message_bytes
                    event.message.release()
            if server.of(Lost):
                break
        server.events = [event for event in server.events if not isinstance(event, Received)]
        assert len(server.of(Lost, hostile)) <= 1
        near.send([b"undisturbed"])
        shm_net.arrive(server, far, 1)
        assert server.take(far) == [b"undisturbed"]


def test_running_out_of_file_descriptors_pauses_the_listener(shm_net, monkeypatch):
    monkeypatch.setattr(reception, "_ACCEPT_PAUSE_S", 0.05)
    server = shm_net.station("server")
    client = shm_net.station("client")
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
        for _ in range(3):
            assert server.poll(0.01) == []
    finally:
        for fd in spare:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    shm_net.pump(lambda: client.of(Connected, near))


def test_available_memory_is_plausible():
    assert 1 << 20 < available_bytes() < 1 << 50


def test_the_rings_are_allocated_in_full(shm_net):
    """Touching a page later can then never fail."""
    client, server = shm_net.station("client"), shm_net.station("server")
    client.transport.connect(server.address, b"", LIMITS)
    fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    rings = [os.stat(fd) for fd in fds if os.path.exists(fd) and "infinite-llm-rings" in os.readlink(fd)]
    assert rings
    assert all(status.st_blocks * 512 >= status.st_size == TOTAL for status in rings)
    assert TOTAL % mmap.PAGESIZE == 0
