"""A step's computation by all ranks, as their leader sees it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from services.core.errors import PeerLostError
from services.dataplane.device import Device
from services.dataplane.peers import PeerSet
from services.instance.batch import Batch
from services.instance.dist_attention import DistAttention
from services.instance.forward import Forward
from services.instance.model import Model
from services.instance.ranks.leader import Ranks
from services.instance.ranks.lockstep import LockstepRemoteAttention
from services.instance.ranks.orders import DaemonAddress, StepOrder


class RankedForward(Forward):
    """The leader's own part, and the other ranks'. A step is good if it is good on every rank."""

    def __init__(
        self,
        model: Model,
        attention: DistAttention,
        remote: LockstepRemoteAttention,
        device: Device,
        peers: PeerSet,
        ranks: Ranks,
    ) -> None:
        super().__init__(model, attention, remote, device)
        self._lockstep = remote
        self._peers = peers
        self._ranks = ranks

    def run(self, step: int, batch: Batch) -> Tensor:
        self._ranks.send(self._order(step, batch))
        try:
            logits = super().run(step, batch)
        except RuntimeError:  # of a collective, as a rule
            self._ranks.end_if_one_is_gone()
            raise
        failures = [] if self._lockstep.failure is None else [str(self._lockstep.failure)]
        for rank, end in self._ranks.ends(step):
            for lost in end.lost:
                self._peers.report_lost(lost.kvdaemon_id, lost.session_id, f"rank {rank}: {lost.reason}")
            if end.failure:
                failures.append(f"rank {rank}: {end.failure}")
        if failures:
            raise PeerLostError("; ".join(failures))
        return logits

    def _order(self, step: int, batch: Batch) -> StepOrder:
        """Every rank gets every plan, or a daemon would know less of a sequence from one than from another."""
        connected = [self._peers.get(s.kvdaemon_id) for s in batch.shares if self._peers.is_connected(s.kvdaemon_id)]
        daemons = tuple(DaemonAddress(peer.kvdaemon_id, peer.address, peer.session_id) for peer in connected)
        untraced = tuple(replace(share, traces=()) for share in batch.shares)  # a daemon's span is told of once
        forgotten, self._lockstep.forgotten = tuple(self._lockstep.forgotten), []
        return StepOrder(step, replace(batch, shares=untraced), daemons, forgotten)
