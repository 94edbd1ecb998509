"""A pool in GPU memory: one allocation of the daemon's, which the instance on the same GPU maps by CUDA IPC.

The memory is the daemon's. When the daemon ends, an instance that has it mapped must not touch it any more: it ends
too, because its session is gone, and a kernel that runs meanwhile may fail, which ends it as well. When the instance
ends, what it had asked the GPU for may still run for a moment (with MPS the server finishes it), and could write to
blocks that are free by then; so the pool lingers.
"""

from __future__ import annotations

from functools import partial
from uuid import UUID

import torch
from torch import Tensor

from services.core.blocks import PoolGeometry
from services.core.errors import ConfigError, PeerLostError
from services.dataplane.cuda_runtime import HANDLE_BYTES, CudaError, CudaRuntime
from services.dataplane.kv_pool import Grant, Mapping, MemoryKind, Pool, blocks_of

_UUID_BYTES = 16
_MIB = 1 << 20
_LINGER_S = 5.0  # more than any layer takes; a step's later layers are not asked for any more


class CudaPool(Pool):
    """
    Args:
        device: a GPU.

    Raises:
        ConfigError: there is not that much memory.
    """

    linger_s = _LINGER_S

    def __init__(self, device: torch.device, pool_bytes: int) -> None:
        if pool_bytes < 1:
            raise ConfigError(f"pool_bytes must be positive, got {pool_bytes}")
        self.pool_bytes = pool_bytes
        runtime = CudaRuntime(device.index)
        try:
            memory = runtime.allocate(pool_bytes)
            self._descriptor = device_uuid(device) + runtime.handle(memory)
        except CudaError as error:
            free, total = torch.cuda.mem_get_info(device)
            raise ConfigError(
                f"cannot allocate {pool_bytes / _MIB:.0f} MiB for the pool on {device}: {free / _MIB:.0f} of "
                f"{total / _MIB:.0f} MiB are free ({error}); lower pool_mib, or give the model less"
            ) from error
        self._content: Tensor | None = torch.as_tensor(memory, device=device)

    def grant(self) -> Grant:
        return Grant(MemoryKind.CUDA, self.pool_bytes, self._descriptor)

    def as_tensor(self, geometry: PoolGeometry) -> Tensor:
        assert self._content is not None, "the pool is closed"
        return blocks_of(self._content, geometry)

    def close(self) -> None:
        self._content = None


def map_cuda_pool(device: torch.device, grant: Grant) -> Mapping:
    """A daemon's pool on this GPU.

    Raises:
        ConfigError: it lies elsewhere, or CUDA does not let this process have it.
        PeerLostError: the descriptor is not one.
    """
    if grant.kind is not MemoryKind.CUDA:
        raise ConfigError(
            f"the daemon's pool lies in host memory, and this process computes on {device}: give both the same device"
        )
    check_descriptor(grant.descriptor, device_uuid(device), str(device))
    runtime = CudaRuntime(device.index)
    try:
        memory = runtime.open(grant.descriptor[_UUID_BYTES:], grant.pool_bytes)
    except CudaError as error:
        raise ConfigError(
            f"the daemon's pool on {device} cannot be mapped ({error}): daemon and instance must run as one user, in "
            "one IPC and one PID namespace (in a pod: shareProcessNamespace), and both under MPS or neither"
        ) from error
    return Mapping(memory, torch.as_tensor(memory, device=device), partial(runtime.close, memory.pointer))


def check_descriptor(descriptor: bytes, uuid: bytes, device: str) -> None:
    """
    Raises:
        ConfigError: it names memory of another GPU.
        PeerLostError: it is not one.
    """
    if len(descriptor) != _UUID_BYTES + HANDLE_BYTES:
        raise PeerLostError(f"the daemon names its GPU memory by {len(descriptor)} bytes: it is of another version")
    if descriptor[:_UUID_BYTES] != uuid:
        raise ConfigError(
            f"the daemon's pool lies on GPU {descriptor[:_UUID_BYTES].hex()}, and this process computes on {device}, "
            f"which is GPU {uuid.hex()}: give both the same device"
        )


def device_uuid(device: torch.device) -> bytes:
    """[16], the same in every process, whatever index the GPU has there."""
    return UUID(str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")).bytes
