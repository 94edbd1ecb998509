"""The pool's memory: its shape, its sharing between processes, and the proof that a process has let go of it."""

import asyncio
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from open_files import open_files
from signals import send_signal

from services.core.blocks import PoolGeometry
from services.core.errors import ConfigError, PeerLostError, SessionRevokedError, TransferTimeoutError
from services.dataplane import kv_pool
from services.dataplane.host_device import HostDevice
from services.dataplane.kv_pool import KvPool, Pages, map_memory, pool_tensor
from services.dataplane.memfd import HUGE_PAGE_BYTES, put_together
from services.dataplane.pool_socket import MappedPool, PoolSocketServer, map_pool
from services.kvdaemon.config import KvDaemonConfig

GEOMETRY = PoolGeometry(layers=2, kv_heads=3, block_tokens=4, head_dim=8, dtype="bfloat16")
BLOCKS = 5
DEADLINE_S = 20.0
MAPPER = Path(__file__).with_name("pool_mapper.py")


class Daemon:
    """A pool socket served by an event loop in a thread of its own, as a kvdaemon's main thread does."""

    def __init__(self, path):
        self.path = path
        self.pool = KvPool(BLOCKS * GEOMETRY.block_bytes + 100)
        self.allowed = set(range(1, 100))
        self.hung_up = []
        self.changed = threading.Condition()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.server = PoolSocketServer(path, self.pool, self.allowed.__contains__, self._hung_up)
        self.call(self.server.start)

    def call(self, function):
        async def run():
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(DEADLINE_S)

    def wait_for_hang_ups(self, sessions):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.hung_up) >= len(sessions), DEADLINE_S)
        self.call(lambda: None)
        assert self.hung_up == sessions

    def close(self):
        self.call(self.server.close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(DEADLINE_S)
        self.loop.close()
        self.pool.close()

    def _hung_up(self, session_id):
        with self.changed:
            self.hung_up.append(session_id)
            self.changed.notify_all()


@pytest.fixture
def daemon(directory):
    daemon = Daemon(directory / "pool")
    yield daemon
    daemon.close()


@pytest.fixture
def start(daemon):
    processes = []

    def start(session_id):
        process = subprocess.Popen(
            [sys.executable, MAPPER, daemon.path, str(session_id)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        processes.append(process)
        assert process.stdout.readline() == "mapped\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait(10)
        process.stdout.close()
        process.stdin.close()


def soon():
    return time.monotonic() + DEADLINE_S


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_pool_is_a_tensor_of_blocks(dtype):
    geometry = PoolGeometry(layers=2, kv_heads=3, block_tokens=4, head_dim=8, dtype=dtype)
    pool = KvPool(BLOCKS * geometry.block_bytes + 100)
    status = os.fstat(pool.fd)
    assert status.st_blocks * 512 >= status.st_size == pool.pool_bytes
    blocks = pool.as_tensor(geometry)
    assert blocks.shape == (BLOCKS, 2, 3, 2, 4, 8)
    assert blocks.dtype == getattr(torch, dtype)
    assert blocks.is_contiguous()
    assert not blocks.any()
    blocks[3, 1, 2, 1] = 1.5
    again = pool.as_tensor(geometry)
    pool.close()
    pool.close()
    del blocks
    assert again[3, 1, 2, 1].eq(1.5).all()  # the last tensor keeps the memory
    assert again.count_nonzero() == 4 * 8


def test_a_pool_of_reserved_huge_pages_is_shared_like_any():
    if _free_huge_pages() < 2:
        pytest.skip("no huge pages are reserved on this machine (vm.nr_hugepages)")
    free, pool = _free_huge_pages(), KvPool(2 * HUGE_PAGE_BYTES, Pages.RESERVED)
    blocks = pool.as_tensor(GEOMETRY)
    blocks[-1].fill_(1.5)
    other = map_memory(pool.grant()).memory
    assert torch.equal(pool_tensor(other, GEOMETRY), blocks)
    assert _free_huge_pages() == free - 2
    pool.close()
    del blocks, other
    assert _free_huge_pages() == free


def test_small_pages_are_put_together_for_all_who_map_them():
    size = 4 * HUGE_PAGE_BYTES + 4096
    pool = KvPool(size, Pages.SMALL)
    content, mapped = pool.as_tensor(GEOMETRY).view(torch.uint8).flatten(), map_memory(pool.grant())
    assert content.data_ptr() % HUGE_PAGE_BYTES == mapped.content.data_ptr() % HUGE_PAGE_BYTES == 0
    content[:] = torch.randint(256, (len(content),), dtype=torch.uint8)
    expected, before = content.clone(), _huge_mapped_bytes()
    put_together(mapped.memory)
    for tensor in (content, mapped.content[: len(content)]):
        assert torch.equal(tensor, expected)
    gained = _huge_mapped_bytes() - before
    if gained == 0:
        pytest.skip("this system does not put pages of shared memory together")
    assert gained == 2 * 4 * HUGE_PAGE_BYTES
    pool.close()
    addresses = content.data_ptr(), mapped.content.data_ptr()
    del content, mapped, tensor
    assert not any(f"{address:x}-" in Path("/proc/self/maps").read_text() for address in addresses)


def test_a_pool_does_so_in_the_background():
    pool = KvPool(4 * HUGE_PAGE_BYTES)
    pool.as_tensor(GEOMETRY)[-1].fill_(1.5)
    pool.wait_until_together(DEADLINE_S)
    assert pool.as_tensor(GEOMETRY)[-1].eq(1.5).all()
    assert not pool.as_tensor(GEOMETRY)[:-1].any()
    pool.close()


def test_who_serves_meanwhile_goes_first(monkeypatch):
    priorities = []

    def put_together(memory):
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    monkeypatch.setattr(kv_pool, "put_together", put_together)
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    pool = KvPool(4 * HUGE_PAGE_BYTES)
    pool.wait_until_together(DEADLINE_S)
    pool.close()
    assert priorities == [min(own + 10, 19)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


def _huge_mapped_bytes():
    return 1024 * sum(map(int, re.findall(r"ShmemPmdMapped: +(\d+)", Path("/proc/self/smaps").read_text())))


def _free_huge_pages():
    (line,) = re.findall(r"HugePages_Free: +(\d+)", Path("/proc/meminfo").read_text()) or ["0"]
    return int(line)


def test_huge_pages_are_of_host_memory():
    config = KvDaemonConfig("c", "k", ("127.0.0.1:2379",), 4, Path("/tmp/sockets"), huge_pages=True)
    with pytest.raises(ConfigError, match="huge_pages are of host memory, and device is 'cuda:1'"):
        replace(config, device="cuda:1")


def test_pools_that_cannot_be():
    with pytest.raises(ConfigError, match=r"536870912 huge pages .* free: reserve more \(sysctl vm.nr_hugepages"):
        KvPool(1 << 50, Pages.RESERVED)
    with pytest.raises(ConfigError, match=r"huge pages have 2 MiB, and .* should have 3 MiB"):
        KvPool(3 << 20, Pages.RESERVED)
    with pytest.raises(ConfigError, match=r"cannot allocate 1125899906842624 bytes .* MiB of memory are available"):
        KvPool(1 << 50)
    with pytest.raises(ConfigError, match="positive"):
        KvPool(0)
    pool = KvPool(GEOMETRY.block_bytes - 1)
    with pytest.raises(ConfigError, match="holds no block"):
        pool.as_tensor(GEOMETRY)
    pool.close()


def test_a_process_maps_the_same_memory(daemon, start):
    process = start(7)
    blocks = daemon.pool.as_tensor(GEOMETRY)
    assert blocks[1].eq(7).all()
    assert blocks.count_nonzero() == blocks[1].numel()
    assert daemon.hung_up == []
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "closed\n"
    daemon.wait_for_hang_ups([7])  # the process is alive, but without the mapping
    process.kill()
    process.wait(10)
    start(7)  # the session may map again
    daemon.wait_for_hang_ups([7])


def test_a_killed_process_hangs_up(daemon, start):
    first, second = start(1), start(2)
    first.kill()
    daemon.wait_for_hang_ups([1])
    second.kill()
    daemon.wait_for_hang_ups([1, 2])


def test_a_stopped_process_does_not_hang_up(daemon, start):
    stopped, other = start(1), start(2)
    send_signal(stopped.pid, signal.SIGSTOP)
    other.kill()
    daemon.wait_for_hang_ups([2])
    with pytest.raises(SessionRevokedError):
        map_pool(daemon.path, 1, soon())  # still mapped
    stopped.kill()
    daemon.wait_for_hang_ups([2, 1])


def test_who_may_not_map(daemon):
    with pytest.raises(SessionRevokedError, match="0x3e8"):
        map_pool(daemon.path, 1000, soon())
    daemon.allowed.add(1000)
    pool = map_pool(daemon.path, 1000, soon())
    with pytest.raises(SessionRevokedError):
        map_pool(daemon.path, 1000, soon())
    assert daemon.hung_up == []
    pool.close()
    pool.close()
    daemon.wait_for_hang_ups([1000])


def test_a_tensor_holds_the_mapping(daemon):
    pool = map_pool(daemon.path, 5, soon())
    blocks = pool.as_tensor(GEOMETRY)
    pool.close()
    blocks[0] = 1
    with pytest.raises(SessionRevokedError):
        map_pool(daemon.path, 5, soon())
    assert daemon.hung_up == []
    del blocks
    daemon.wait_for_hang_ups([5])


def test_who_was_given_the_mapping_by_another_process_hangs_up_with_it(daemon):
    """The ranks of an instance share a mapping: it has ended when the last of them has let go."""
    pool = map_pool(daemon.path, 6, soon())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"f"], pool.files)
        _, (memfd, sock), _, _ = socket.recv_fds(theirs, 1, 2)
    other = MappedPool(replace(pool.grant, fds=(memfd,)), sock, HostDevice())
    pool.as_tensor(GEOMETRY)[2] = 3
    pool.close()
    with pytest.raises(SessionRevokedError):
        map_pool(daemon.path, 6, soon())
    assert daemon.hung_up == []
    assert other.as_tensor(GEOMETRY)[2].eq(3).all()
    other.close()
    daemon.wait_for_hang_ups([6])


def test_a_daemon_that_is_not_there(directory):
    with pytest.raises(PeerLostError):
        map_pool(directory / "nobody", 1, soon())


def test_a_daemon_that_does_not_answer(directory):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "silent"))
        listener.listen()
        with pytest.raises(TransferTimeoutError):
            map_pool(directory / "silent", 1, time.monotonic() + 0.05)


def test_a_daemon_that_hangs_up(directory):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "rude"))
        listener.listen()
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        with pytest.raises(PeerLostError):
            map_pool(directory / "rude", 1, soon())
        thread.join(10)


def test_clients_that_speak_something_else(daemon):
    for data in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"IFLLMKV2", b""):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(daemon.path))
            client.settimeout(DEADLINE_S)
            client.send(data)
    pool = map_pool(daemon.path, 1, soon())
    pool.close()
    daemon.wait_for_hang_ups([1])


def test_a_client_that_talks_on_and_a_server_that_closes(daemon):
    pool = map_pool(daemon.path, 1, soon())
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(daemon.path))
        client.settimeout(DEADLINE_S)
        client.send(b"IFLLMKV2" + (2).to_bytes(8, "little") + b"more than asked for")
        _, fds, _, _ = socket.recv_fds(client, 10, 1)
        os.close(fds[0])
    daemon.wait_for_hang_ups([2])
    daemon.call(daemon.server.close)
    daemon.call(daemon.server.close)
    assert not daemon.path.exists()
    assert pool.as_tensor(GEOMETRY).shape[0] == BLOCKS
    pool.close()
    assert daemon.hung_up == [2]


def test_nothing_is_left_open(daemon):
    before = open_files()
    for session in range(1, 6):
        pool = map_pool(daemon.path, session, soon())
        with pytest.raises(SessionRevokedError):
            map_pool(daemon.path, 500, soon())
        blocks = pool.as_tensor(GEOMETRY)
        pool.close()
        del blocks
        daemon.wait_for_hang_ups(list(range(1, session + 1)))
    assert open_files() <= before


def test_a_pool_that_lingers_believes_in_a_hang_up_later(daemon):
    """As in GPU memory: what a process began before it ended may still be under way."""
    daemon.pool.linger_s = 0.01
    map_pool(daemon.path, 1, soon()).close()
    daemon.wait_for_hang_ups([1])
    daemon.pool.linger_s = 1e6
    map_pool(daemon.path, 2, soon()).close()
    with pytest.raises(SessionRevokedError):  # whether its mapping is gone already or not
        map_pool(daemon.path, 2, soon())
    map_pool(daemon.path, 3, soon()).close()
    assert daemon.hung_up == [1]
    daemon.call(daemon.server.close)
    assert daemon.hung_up == [1]


@pytest.mark.parametrize(("kind", "reason"), [(7, "memory of kind 7"), (0, "passed no memory")])
def test_an_answer_without_memory_that_can_be_mapped(directory, kind, reason):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "odd"))
        listener.listen()

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(100)
                client.sendall(struct.pack("<BBQ", 0, kind, 4096))

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(PeerLostError, match=reason):
            map_pool(directory / "odd", 1, soon())
        thread.join(10)
