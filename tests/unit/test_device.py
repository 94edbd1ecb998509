"""Devices: names, what is packed for them, and what would be wrong without a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import AttentionPlan
from services.core.errors import ConfigError, PeerLostError
from services.dataplane.cuda_device import check_gpu
from services.dataplane.cuda_pool import check_descriptor
from services.dataplane.cuda_runtime import loaded_library
from services.dataplane.device import BlockBytes, Device, upload_plan
from services.dataplane.device_name import DeviceName, parse_device
from services.dataplane.devices import open_device
from services.dataplane.host_device import HostDevice
from services.dataplane.interpreted_device import InterpretedDevice
from services.dataplane.kv_pool import Grant, KvPool, MemoryKind
from services.dataplane.staged_device import packed_starts

UUID = bytes(range(16))
DTYPES = (torch.int64, torch.int32, torch.bool, torch.bfloat16, torch.float32)


@pytest.fixture(params=["cpu", "interpreter"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return open_device(request.param)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cpu", DeviceName("cpu")),
        ("cuda", DeviceName("cuda", 0)),
        ("cuda:3", DeviceName("cuda", 3)),
        ("interpreter", DeviceName("interpreter")),
    ],
)
def test_names(text: str, name: DeviceName) -> None:
    assert parse_device(text) == name


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "interpreter:1", "CUDA", "cuda:0 "])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="cuda:N"):
        parse_device(text)


def test_a_gpu_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=r"device cuda:0: .* set device: cpu"):
        open_device("cuda")


@pytest.mark.parametrize(
    ("index", "built_for", "capabilities", "message"),
    [
        (0, None, [], "built without CUDA"),
        (0, "12.8", [], "sees 0 GPUs"),
        (2, "12.8", [(9, 0), (9, 0)], "cuda:2: torch sees 2 GPUs"),
        (0, "12.8", [(7, 5)], r"compute capability is 7\.5; 8\.0 \(Ampere\)"),
    ],
)
def test_gpus_that_will_not_do(index: int, built_for: str | None, capabilities: list[tuple[int, int]], message: str):
    with pytest.raises(ConfigError, match=message):
        check_gpu(index, built_for, capabilities)


def test_a_gpu_that_will_do() -> None:
    assert check_gpu(1, "12.8", [(7, 5), (8, 0)]) is None  # the one that is asked for counts


def test_the_interpreter_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        open_device("interpreter")


def test_a_gpus_pool_is_mapped_on_that_gpu_only() -> None:
    handle = UUID + bytes(64)
    check_descriptor(handle, UUID, "cuda:0")
    with pytest.raises(ConfigError, match="computes on cuda:0"):
        check_descriptor(handle, bytes(16), "cuda:0")
    with pytest.raises(PeerLostError, match="12 bytes"):
        check_descriptor(bytes(12), UUID, "cuda:0")
    with pytest.raises(ConfigError, match="GPU memory"):
        HostDevice().map_pool(Grant(MemoryKind.CUDA, 1 << 20, handle))


def test_torchs_own_cuda_runtime_is_found() -> None:
    path = "/venv/lib/python3.12/site-packages/nvidia/cuda_runtime/lib/libcudart.so.12"
    maps = f"7f00-7f10 r-xp 00000000 08:01 42 /lib/libc.so.6\n7f10-7f20 r-xp 00000000 08:01 42 {path}\n7f30-7f40 rw-p"
    assert loaded_library(maps) == path
    assert loaded_library(maps.replace("libcudart.so.12", "libcudart-a1b2.so.13.0.96")).endswith(".so.13.0.96")
    with pytest.raises(ConfigError, match="libcudart"):
        loaded_library("7f00-7f10 r-xp 00000000 08:01 42 /lib/libc.so.6")


@given(st.lists(st.integers(0, 300)))
def test_packed_parts_are_aligned_and_do_not_overlap(sizes: list[int]) -> None:
    starts = packed_starts(sizes)
    assert len(starts) == len(sizes) + 1
    assert starts[0] == 0
    for size, start, following in zip(sizes, starts, starts[1:], strict=False):
        assert start % 64 == 0
        assert following - start >= size


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 40), st.integers(1, 3)), max_size=8))
def test_what_is_uploaded_arrives_whatever_it_is(parts: list[tuple[torch.dtype, int, int]]) -> None:
    tensors = [torch.randint(0, 2, (rows, dim)).to(dtype) for dtype, rows, dim in parts]
    for device in (HostDevice(), _interpreted()):
        uploaded = device.upload(tensors)
        assert [(t.dtype, t.shape) for t in uploaded] == [(t.dtype, t.shape) for t in tensors]
        assert all(torch.equal(a, b) for a, b in zip(uploaded, tensors, strict=True))


def _interpreted() -> InterpretedDevice:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return InterpretedDevice()


def test_what_was_uploaded_is_the_devices_own() -> None:
    mine = torch.arange(5)
    (uploaded,) = _interpreted().upload([mine[1:4]])
    mine.zero_()
    assert uploaded.tolist() == [1, 2, 3]


def test_a_plan_is_uploaded(device: Device) -> None:
    ints = [torch.arange(n, dtype=torch.int32) for n in (3, 2, 3, 7, 7)]
    plan = AttentionPlan(*ints, max_query_len=4)
    uploaded = upload_plan(plan, device)
    assert uploaded.max_query_len == 4
    assert uploaded.segments == 2
    for name in ("query_start", "query_pos", "block_start", "block_ids", "block_pos"):
        assert torch.equal(getattr(uploaded, name), getattr(plan, name))


def test_a_download_is_of_the_moment_it_began(device: Device) -> None:
    columns = torch.arange(12, dtype=torch.float32).view(3, 4)[:, 1:3]  # not contiguous
    download = device.download(columns)
    content = download.wait()
    assert download.arrived
    assert torch.frombuffer(content, dtype=torch.float32).tolist() == [1, 2, 5, 6, 9, 10]


def test_only_the_cpus_own_memory_is_there_at_once() -> None:
    assert HostDevice().download(torch.zeros(1)).arrived
    assert not _interpreted().download(torch.zeros(1)).arrived


def test_blocks_as_bytes(device: Device) -> None:
    pool = torch.zeros(3, 2, 4, dtype=torch.bfloat16)
    blocks = BlockBytes(pool, device)
    content = torch.arange(8, dtype=torch.bfloat16).view(torch.uint8).numpy().data
    blocks.write(1, content)
    assert pool[1].flatten().tolist() == list(range(8))
    assert not pool[0].any()
    assert not pool[2].any()
    assert blocks.read(1) == content


def test_a_stopwatch_counts_from_its_first_mark(device: Device) -> None:
    watch = device.stopwatch()
    watch.mark()
    watch.reset()
    assert watch.take() == []
    watch.mark()
    watch.mark()
    device.settle()
    first, second = watch.take()
    assert first == 0 <= second
    assert watch.take() == []


def test_a_pool_and_its_kernels(device: Device) -> None:
    pool = device.make_pool(1 << 16)
    assert isinstance(pool, KvPool)
    mapped = device.map_pool(pool.grant())
    assert len(mapped.content) == 1 << 16
    pool.close()
    if device.name == "cpu":  # Triton may have been loaded to compile
        assert device.load_kernels(1).name in ("cpu", "reference")
