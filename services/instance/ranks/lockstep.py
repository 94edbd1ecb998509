"""Remote attention of a rank: a failure ends the step, but not before its last layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels import AttentionKernels, LayerParams
from kernels.layer_stack import NOT_BEGUN, LeftAttention
from services.core.errors import PeerLostError, TransferTimeoutError
from services.dataplane.device import Device
from services.dataplane.peers import PeerSet
from services.dataplane.remote_attention import PeerShare, RemoteAttention


class LockstepRemoteAttention(RemoteAttention):
    """Remembers what fails and goes on with what it has.

    A rank that gave up in the middle of a step would leave the others waiting in a collective that it never joins. So
    it computes the rest of the step, without the daemons and for nothing, and all ranks hear of it at the end.

    Attributes:
        failure: why the present step is void; None if it is not.
        forgotten: (daemon, segment) of all calls of ``forget``; the owner empties it.
    """

    def __init__(
        self,
        peers: PeerSet,
        kernels: AttentionKernels,
        out_dtype: str,
        timeout_s: float,
        device: Device | None = None,
    ) -> None:
        super().__init__(peers, kernels, out_dtype, timeout_s, device)
        self.failure: PeerLostError | TransferTimeoutError | None = None
        self.forgotten: list[tuple[str, int]] = []

    def forget(self, kvdaemon_id: str, segment_handle: int) -> None:
        super().forget(kvdaemon_id, segment_handle)
        self.forgotten.append((kvdaemon_id, segment_handle))

    def begin_step(self, step: int, shares: Sequence[PeerShare]) -> None:
        self.failure = None
        try:
            super().begin_step(step, shares)
        except PeerLostError as error:
            self.failure = error

    def lend(self) -> bool:
        return self.failure is None and super().lend()

    def submit(self, params: LayerParams, q: Tensor, left: LeftAttention = NOT_BEGUN) -> bool:
        if self.failure is None:
            try:
                return super().submit(params, q, left)
            except PeerLostError as error:
                self.failure = error
        return False

    def collect(self, out: Tensor, lse: Tensor) -> None:
        try:
            super().collect(out, lse)
        except (PeerLostError, TransferTimeoutError) as error:
            self.failure = error
