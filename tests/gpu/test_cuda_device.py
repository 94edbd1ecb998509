"""A GPU as a device, and pools in its memory that another process maps."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_pool_mapper import GEOMETRY

from services.core.errors import ConfigError
from services.dataplane.device import BlockBytes, Device
from services.dataplane.devices import open_device
from services.dataplane.host_device import HostDevice
from services.dataplane.kv_pool import KvPool, Pool
from services.dataplane.pool_socket import PoolSocketServer

DEADLINE_S = 60.0
BLOCKS = 4
MAPPER = Path(__file__).parent / "cuda_pool_mapper.py"


@pytest.fixture(scope="module")
def device() -> Device:
    return open_device("cuda")


def test_what_goes_up_comes_down(device: Device) -> None:
    tensors = [torch.arange(10), torch.randn(3, 5, dtype=torch.bfloat16), torch.empty(0, dtype=torch.int32)]
    for _ in range(100):  # staging memory is used again
        uploaded = device.upload(tensors)
        assert all(tensor.is_cuda for tensor in uploaded)
        downloads = [device.download(tensor) for tensor in uploaded]
        for download, tensor in zip(downloads, tensors, strict=True):
            if tensor.numel():
                assert torch.equal(torch.frombuffer(download.wait(), dtype=tensor.dtype).view(tensor.shape), tensor)


def test_a_download_is_of_the_moment_it_began(device: Device) -> None:
    values = torch.zeros(1 << 20, device=device.tensors)
    downloads = []
    for number in range(20):
        values.fill_(number)
        downloads.append(device.download(values))
    for number, download in enumerate(downloads):
        assert torch.frombuffer(download.wait(), dtype=torch.float32).eq(number).all()
        assert download.arrived


def test_an_upload_is_there_for_what_is_computed_next(device: Device) -> None:
    total = torch.zeros((), device=device.tensors)
    for number in range(200):
        (uploaded,) = device.upload([torch.full((1 << 16,), float(number))])
        total += uploaded.sum() / (1 << 16)
    assert total.item() == sum(range(200))


def test_a_stopwatch_tells_the_gpus_time(device: Device) -> None:
    watch = device.stopwatch()
    matrix = torch.randn(4096, 4096, device=device.tensors)
    watch.mark()
    for _ in range(20):
        matrix @ matrix
    watch.mark()
    device.settle()
    first, last = watch.take()
    assert first == 0
    assert last > 1e-4  # 2.7 TFLOP


@pytest.fixture
def pool(device: Device) -> Iterator[Pool]:
    pool = device.make_pool(BLOCKS * GEOMETRY.block_bytes + 100)
    yield pool
    pool.close()


def test_a_pool_is_one_tensor_of_blocks(device: Device, pool: Pool) -> None:
    blocks = pool.as_tensor(GEOMETRY)
    assert blocks.shape == (BLOCKS, *GEOMETRY.block_shape)
    assert blocks.is_cuda
    blocks.zero_()
    content = torch.randn(GEOMETRY.block_shape, dtype=torch.bfloat16)
    host = BlockBytes(blocks, device)
    host.write(3, memoryview(content.view(torch.uint8).numpy()).cast("B"))
    assert torch.equal(blocks[3].cpu(), content)
    assert not blocks[:3].any()
    assert torch.equal(torch.frombuffer(host.read(3), dtype=torch.bfloat16).view(content.shape), content)
    pool.close()
    assert torch.equal(blocks[3].cpu(), content)  # the last tensor keeps the memory


def test_pools_that_cannot_be(device: Device, pool: Pool) -> None:
    with pytest.raises(ConfigError, match=r"cannot allocate .* MiB are free .* lower pool_mib"):
        device.make_pool(1 << 50)
    assert torch.zeros(1, device=device.tensors).item() == 0  # the failed call is forgotten
    with pytest.raises(ConfigError, match="lies in host memory"):
        device.map_pool(KvPool(1 << 20).grant())
    with pytest.raises(ConfigError, match="lies in GPU memory"):
        HostDevice().map_pool(pool.grant())
    with pytest.raises(ConfigError, match="cannot be mapped"):  # by its own process, CUDA does not
        device.map_pool(pool.grant())


class _Daemon:
    """A pool socket's server in a thread."""

    def __init__(self, path: Path, pool: Pool) -> None:
        self.hung_up: list[int] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = PoolSocketServer(path, pool, lambda _: True, self.hung_up.append)
        self._loop.call_soon_threadsafe(self._server.start)

    def close(self) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (self._server.close(), done.set()))
        assert done.wait(DEADLINE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)

    def wait_for_hang_ups(self, sessions: list[int]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while sorted(self.hung_up) != sessions:
            assert time.monotonic() < deadline, self.hung_up
            time.sleep(0.05)


def test_other_processes_map_the_same_memory(tmp_path: Path, device: Device, pool: Pool) -> None:
    """Two of them; one lets go, one is killed, and the daemon learns of both once the memory is still."""
    blocks = pool.as_tensor(GEOMETRY)
    blocks.zero_()
    blocks[2] = 3.0
    device.settle()
    daemon = _Daemon(tmp_path / "pool", pool)
    processes = [
        subprocess.Popen(
            [sys.executable, str(MAPPER), str(tmp_path / "pool"), str(session)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for session in (1, 2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "mapped 3\n"
        assert blocks[1].eq(3.0).all()  # 1 + 2
        assert daemon.hung_up == []
        first, second = processes
        assert first.stdin is not None
        assert first.stdout is not None
        first.stdin.write("\n")
        first.stdin.flush()
        assert first.stdout.readline() == "closed\n"
        second.kill()
        second.wait(DEADLINE_S)
        assert daemon.hung_up == [], "what a process has begun may still be under way"
        daemon.wait_for_hang_ups([1, 2])
    finally:
        for process in processes:
            process.kill()
            process.wait(DEADLINE_S)
        daemon.close()
