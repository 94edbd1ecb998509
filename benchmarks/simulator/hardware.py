"""What devices and links can do. Every number's source is in README.md, section "Hardware"."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of device, in nodes of several.

    Attributes:
        memory_bytes: of one device.
        flops_per_s: dense bfloat16 arithmetic of one device, as published.
        bytes_per_s: memory of one device, as published.
        devices_per_node: that share the fast link.
        local_bytes_per_s: of one device to the others of its node, one direction.
        network_bytes_per_s: of one node to other nodes, one direction, shared by its devices.
        local_hop_s, network_hop_s: a small message from a device to another one, in its node or in another.
        local_reduce_s: an all-reduce of little data in one node.
        matmul, read, attention: share of the published rates that matrix products, reading weights and keys, and
            prefill's attention reach.
        kernels_s: of a layer, whatever it computes: launches and the work between large kernels.
        attention_kernel_s: of a layer's attention, whatever it reads.
        usable: share of the memory that weights, activations and KV cache may take.
        reserved_bytes: of it, for activations.
    """

    name: str
    memory_bytes: float
    flops_per_s: float
    bytes_per_s: float
    devices_per_node: int
    local_bytes_per_s: float
    network_bytes_per_s: float
    local_hop_s: float = 5e-6
    network_hop_s: float = 20e-6
    local_reduce_s: float = 20e-6
    matmul: float = 0.6
    read: float = 0.8
    attention: float = 0.6
    kernels_s: float = 25e-6
    attention_kernel_s: float = 5e-6
    usable: float = 0.9
    reserved_bytes: float = 2e9


A100 = Hardware(
    "a100",
    memory_bytes=80e9,
    flops_per_s=312e12,
    bytes_per_s=2.039e12,
    devices_per_node=8,
    local_bytes_per_s=300e9,
    network_bytes_per_s=25e9,
)
H200 = Hardware(
    "h200",
    memory_bytes=141e9,
    flops_per_s=989e12,
    bytes_per_s=4.8e12,
    devices_per_node=8,
    local_bytes_per_s=450e9,
    network_bytes_per_s=400e9,
)


def this_machine() -> Hardware:
    """A core of this machine, from a short calibration; eight of them to a node, joined by its memory."""
    matrix = np.ones((1024, 1024), dtype=np.float32)
    flops_per_s = 2 * 1024**3 / _best_s(lambda: matrix @ matrix)
    memory = np.ones(2**25, dtype=np.float32)
    bytes_per_s = memory.nbytes / _best_s(memory.sum)
    return Hardware(
        "this-machine",
        memory_bytes=32e9,
        flops_per_s=flops_per_s,
        bytes_per_s=bytes_per_s,
        devices_per_node=8,
        local_bytes_per_s=bytes_per_s / 2,
        network_bytes_per_s=3.125e9,
        local_hop_s=50e-6,
        network_hop_s=100e-6,
        matmul=1.0,
        read=1.0,
        attention=1.0,
        kernels_s=100e-6,
        attention_kernel_s=20e-6,
    )


def _best_s(work: object) -> float:
    assert callable(work)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)
