"""``python -m services.instance.rank``: one of an instance's further ranks. Started by its leader, see ``ranks``."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from dataclasses import replace
from pathlib import Path

from services.core.errors import InfiniteLLMError, PeerLostError
from services.dataplane.device import Device
from services.dataplane.devices import open_device
from services.dataplane.kv_pool import Grant
from services.dataplane.pool_socket import MappedPool
from services.instance.assembly import ComputeParts, assemble_compute
from services.instance.config import InstanceConfig
from services.instance.forward import Forward
from services.instance.loading import prepare_part
from services.instance.model import Model
from services.instance.ranks.leader import READY
from services.instance.ranks.lockstep import LockstepRemoteAttention
from services.instance.ranks.orders import DaemonAddress, RankChannel, StepEnd, StepOrder
from services.instance.ranks.pulse import answer_pulse
from services.runtime.config import load_config
from services.runtime.logs import setup_logging

_log = logging.getLogger("services.instance.rank")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m services.instance.rank", description="A rank of a tensor-parallel instance, which starts it."
    )
    parser.add_argument("--config", type=Path, required=True, help="the instance's")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--channel", type=int, required=True, help="file descriptor of the socket to the leader")
    parser.add_argument("--pulse", type=int, required=True, help="file descriptor of the socket to the leader's watch")
    parser.add_argument("--store", type=Path, required=True, help="file through which the ranks meet")
    arguments = parser.parse_args()
    for signum in (signal.SIGINT, signal.SIGTERM):  # the leader is told, too, and ends the ranks when it has no request
        signal.signal(signum, signal.SIG_IGN)
    try:
        config = load_config(InstanceConfig, arguments.config)
        setup_logging("instance", f"{config.member_id}/rank-{arguments.rank}")
        answer_pulse(arguments.pulse)
        channel = RankChannel(arguments.channel)
        device = open_device(config.device)
        model = prepare_part(config, device, arguments.rank, arguments.store)
        channel.send(READY)
        serve(config, model, device, channel)
    except InfiniteLLMError as error:
        sys.exit(f"infinite-llm instance, rank {arguments.rank}: {error}")
    return 0


def serve(config: InstanceConfig, model: Model, device: Device, channel: RankChannel) -> None:
    """Computes steps until the leader has gone."""
    geometry = model.shape.geometry(config.block_tokens, config.dtype)
    try:
        grant = channel.receive(None)
        assert isinstance(grant, Grant)
        *fds, sock = channel.receive_files(len(grant.fds) + 1)
        pool = MappedPool(replace(grant, fds=tuple(fds)), sock, device)
        rank = Rank(model, assemble_compute(config, model, pool.as_tensor(geometry), device), device)
        _log.info("serving", extra={"heads": model.part.heads(model.shape.kv_heads)})
        while True:
            order = channel.receive(None)
            assert isinstance(order, StepOrder)
            channel.send(rank.compute(order))
    except PeerLostError:
        _log.info("the leader has gone")


class Rank:
    """Computes this process's part of each step that the leader orders."""

    def __init__(self, model: Model, parts: ComputeParts, device: Device) -> None:
        assert isinstance(parts.remote, LockstepRemoteAttention)
        self._peers = parts.peers
        self._remote = parts.remote
        self._forward = Forward(model, parts.attention, parts.remote, device)
        self._sessions: dict[str, int] = {}  # of each daemon's latest connection

    def compute(self, order: StepOrder) -> StepEnd:
        for kvdaemon_id, segment_handle in order.forgotten:
            self._remote.forget(kvdaemon_id, segment_handle)
        self._remote.forgotten.clear()
        for daemon in order.daemons:
            self._connect(daemon)
        self._forward.run(order.step, order.batch)
        failure = self._remote.failure
        return StepEnd(order.step, "" if failure is None else str(failure), tuple(self._peers.take_lost()))

    def _connect(self, daemon: DaemonAddress) -> None:
        """Each session gets one connection: the daemon would know nothing of what was sent over an earlier one."""
        if self._sessions.get(daemon.kvdaemon_id) != daemon.session_id:
            self._peers.disconnect(daemon.kvdaemon_id, "a new session replaces it")
            self._peers.connect(daemon.kvdaemon_id, daemon.address, daemon.session_id)
            self._sessions[daemon.kvdaemon_id] = daemon.session_id
