"""A daemon's worker on a device: what a failed kernel costs, and what a failed device."""

from __future__ import annotations

from kvdaemon_rig import DEADLINE_S, GEOMETRY, Rig, segment

from kernels.reference import ReferenceKernels
from services.dataplane.host_device import HostDevice
from services.kvdaemon.pool_view import PoolView


class _FailingKernels(ReferenceKernels):
    failures = 0

    def micro_attention(self, *arguments: object) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        super().micro_attention(*arguments)  # type: ignore[arg-type]


class _BrokenDevice(HostDevice):
    """As a GPU after a fault: whatever is asked for fails, from then on."""

    def settle(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def ask(rig: Rig, session: int):
    connection = rig.connect(session)
    rig.send_plan(connection, 1, segment(0, 1, 30, [(handle, 0) for handle in rig.sealed(session, [session])]))
    rig.send_query(connection, rig.random(1, 2, GEOMETRY.head_dim), step=1)
    return connection


def test_a_kernel_that_fails_costs_its_asker_the_connection() -> None:
    kernels = _FailingKernels()
    kernels.failures = 1
    with Rig(kernels=kernels) as rig:
        assert "INTERNAL: RuntimeError" in rig.refusal(ask(rig, rig.open("a")))
        _, _, lse = rig.partial(ask(rig, rig.open("b")))
        assert lse.isfinite().all()


def test_a_device_that_has_failed_ends_the_worker() -> None:
    """... and with it the process, which instances notice at once; it would answer nothing any more."""
    kernels = _FailingKernels()
    kernels.failures = 1
    with Rig(kernels=kernels) as rig:
        rig.worker._pool = PoolView(rig.pool, kernels, _BrokenDevice())
        assert "INTERNAL: RuntimeError" in rig.refusal(ask(rig, rig.open("a")))
        rig._thread.join(DEADLINE_S)
        failure, rig.failure = rig.failure, None
        assert "illegal memory access" in str(failure)
