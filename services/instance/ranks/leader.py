"""The other ranks of an instance, in the hands of their leader: started, watched, told what to compute, ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from services.core.errors import PeerLostError, TransferTimeoutError, UnavailableError
from services.dataplane.pool_socket import MappedPool
from services.instance.config import InstanceConfig
from services.instance.ranks.orders import RankChannel, StepEnd, StepOrder
from services.instance.ranks.pulse import Watch
from services.runtime import die_with_parent

READY = "ready"
_CLOSE_TIMEOUT_S = 5.0
_GONE_WAIT_S = 2.0


class Ranks:
    """Processes 1 .. degree - 1. Started by the main thread, with which they die; used by the engine thread afterwards.

    Args:
        config_file: the instance's own, which each rank reads.
        on_lost: told why, in a thread of its own, when a rank is dead or does not answer; there is no going on then.
    """

    def __init__(self, config_file: Path, config: InstanceConfig, on_lost: Callable[[str], None]) -> None:
        self._timeout_s = config.stall_timeout_s
        self._on_lost = on_lost
        self._meeting = tempfile.TemporaryDirectory(prefix="infinite-llm-ranks-", ignore_cleanup_errors=True)
        self.store = Path(self._meeting.name) / "store"
        self._channels: list[RankChannel] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        pulses: list[socket.socket] = []
        for rank in range(1, config.tensor_parallel):
            channel, its_channel = socket.socketpair()
            pulse, its_pulse = socket.socketpair()
            fds = (its_channel.fileno(), its_pulse.fileno())
            command = [
                *(sys.executable, "-I", "-S", str(die_with_parent.__file__), str(os.getpid())),
                *(sys.executable, "-m", "services.instance.rank", "--config", str(config_file), "--rank", str(rank)),
                *("--channel", str(fds[0]), "--pulse", str(fds[1]), "--store", str(self.store)),
            ]
            self._processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=fds))
            its_channel.close()
            its_pulse.close()
            self._channels.append(RankChannel(channel.detach()))
            pulses.append(pulse)
        self._watch = Watch(pulses, self._processes, config.rank_timeout_s, on_lost)

    def await_ready(self) -> None:
        """Until all have loaded and tried their part of the model, as the leader has.

        Raises:
            UnavailableError: one of them has not.
        """
        for rank, channel in enumerate(self._channels, 1):
            try:
                channel.receive(self._timeout_s)
            except (PeerLostError, TransferTimeoutError) as error:
                raise UnavailableError(f"rank {rank} has not loaded its part of the model: {error}") from error
        self._meeting.cleanup()
        self._watch.ask()

    def share_pool(self, pool: MappedPool) -> None:
        """Lets all ranks map the leader's pool. The daemon's proof that nobody writes to it any more is that all are
        dead: they have the same socket."""
        for channel in self._channels:
            channel.send(pool.grant)
            channel.send_files(pool.files)

    def send(self, order: StepOrder) -> None:
        """
        Raises:
            PeerLostError: a rank is gone.
        """
        for channel in self._channels:
            channel.send(order)

    def ends(self, step: int) -> Iterator[tuple[int, StepEnd]]:
        """What each rank says of a step: (rank, end).

        Raises:
            UnavailableError: one of them is gone, or has not come to the step's end.
        """
        for rank, channel in enumerate(self._channels, 1):
            try:
                end = channel.receive(self._timeout_s)
            except (PeerLostError, TransferTimeoutError) as error:
                self.end_if_one_is_gone()
                raise UnavailableError(f"rank {rank} has not come to the end of step {step}: {error}") from error
            assert isinstance(end, StepEnd)
            assert end.step == step, f"rank {rank} is at step {end.step}, not {step}"
            yield rank, end

    def end_if_one_is_gone(self) -> None:
        """Says so, as the watch would a moment later, if a rank's death is behind what has just failed."""
        reason = self._watch.lost(_GONE_WAIT_S)
        if reason is not None:
            self._on_lost(reason)

    def close(self) -> None:
        """Ends all ranks and waits for them."""
        self._watch.close()
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            try:
                process.wait(_CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
