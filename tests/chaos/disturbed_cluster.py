"""A cluster with tight pools, the clients that use it, the harm that is done to it, and what must hold afterwards."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import grpc
from cluster_process import Cluster
from known_requests import KnownRequest
from schedule import LOCAL_DAEMONS, MEMORY_DAEMONS, Disturbance
from signals import send_signal

from infinitellm.internal.v1 import kvdaemon_pb2 as pb
from infinitellm.internal.v1.kvdaemon_pb2_grpc import KvDaemonServiceStub

STREAMS_TIMEOUT_S = 240.0  # all streams of a schedule
RECOVERY_TIMEOUT_S = 120.0  # until everything that died is there again
LOGPROB_TOLERANCE = 1e-3  # other batches round otherwise
TRIGGER_TIMEOUT_S = 20.0  # a disturbance that waits for progress happens at the latest then

DAEMONS = (*LOCAL_DAEMONS, *MEMORY_DAEMONS)
# Pools of 32 rBlocks of 16 tokens; 10 of each instance's are its workspace, up to 6 hold tails: room for 2048
# tokens in full blocks, for requests that together have more than twice as many.
ARGUMENTS = ("--instances", "2", "--kvdaemons", str(len(MEMORY_DAEMONS)), "--pool-mib", "1", "--dtype", "float32")
CONFIG: dict[str, dict[str, object]] = {
    "instance": {"block_tokens": 16, "max_batch_tokens": 64, "max_num_seqs": 6},
    "gateway": {"instance_wait_s": 180.0},  # of machines that start processes slowly
}


class Stream:
    """One client: a streamed completion in a thread of its own.

    Args:
        hang_up_after: closes the connection after so many tokens; None stays to the end.
    """

    def __init__(self, cluster: Cluster, request: KnownRequest, hang_up_after: int | None = None) -> None:
        self.request = request
        self.hang_up_after = hang_up_after
        self.token_ids: list[int] = []
        self.logprobs: list[float | None] = []  # of the prompt too, where they are asked for
        self.error = ""
        self._cluster = cluster
        self._finish_reason: object = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            with closing(self._cluster.stream(list(self.request.prompt), **self.request.parameters)) as chunks:
                for chunk in chunks:
                    if "error" in chunk:
                        self.error = str(chunk["error"])
                        return
                    choice = chunk["choices"][0]  # type: ignore[index]
                    self.token_ids += choice.get("token_ids") or []
                    self.logprobs += (choice.get("logprobs") or {}).get("token_logprobs", [])
                    self._finish_reason = choice.get("finish_reason") or self._finish_reason
                    if self.hang_up_after is not None and len(self.token_ids) > self.hang_up_after:
                        return
        except Exception as failure:
            self.error = f"{type(failure).__name__}: {failure}"

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def wrong(self) -> str:
        """What is wrong with the answer; "" if nothing is."""
        got, expected = self.token_ids, list(self.request.answer)
        if self.hang_up_after is not None and not self.running:
            expected = expected[: len(got)]
        if self.running:
            return f"{self.request.name}: hangs after {len(got)} of {len(expected)} tokens"
        if self.error:
            return f"{self.request.name}: {self.error} after {len(got)} of {len(expected)} tokens"
        if got != expected:
            at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), len(got))
            return (
                f"{self.request.name}: token {at} of {len(expected)} ({len(got)} came) is wrong: "
                f"got {got[at : at + 4]}, expected {expected[at : at + 4]}"
            )
        if self._finish_reason != "length" and self.hang_up_after is None:
            return f"{self.request.name}: ended with {self._finish_reason!r}"
        return self._wrong_scores()

    def _wrong_scores(self) -> str:
        """Of the prompt, whose log-probabilities come with the first token."""
        expected = self.request.prompt_logprobs
        if not expected or not self.token_ids:
            return ""
        count = 1 + len(expected) + len(self.token_ids)
        if len(self.logprobs) != count or self.logprobs[0] is not None:
            return f"{self.request.name}: {len(self.logprobs)} log-probabilities in place of {count}"
        got = self.logprobs[1 : 1 + len(expected)]
        off = [abs(a - b) for a, b in zip(got, expected, strict=True) if a is not None]
        if len(off) < len(expected) or max(off) > LOGPROB_TOLERANCE:
            return f"{self.request.name}: log-probabilities of the prompt are off by up to {max(off, default=0.0):.2g}"
        return ""


class DisturbedCluster:
    """One running cluster. Use as a context; it may serve several schedules.

    Args:
        config: keys of the services' configuration beside those in CONFIG.
    """

    def __init__(self, model: Path, run_dir: Path, config: Mapping[str, Mapping[str, object]] | None = None) -> None:
        merged = {service: {**keys, **(config or {}).get(service, {})} for service, keys in CONFIG.items()}
        self.cluster = Cluster(model, run_dir, *ARGUMENTS, config=merged)
        self._stopped: list[tuple[float, str, int]] = []  # (continue at, process, pid)
        self._log_offsets: dict[Path, int] = {}

    def __enter__(self) -> DisturbedCluster:
        self.cluster.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._continue(float("inf"))
        self.cluster.__exit__()

    def serve(self, requests: Sequence[KnownRequest], disturbances: Sequence[Disturbance]) -> None:
        """Sends all requests at once, does the harm, waits for the answers and compares them."""
        self.events()
        streams = [Stream(self.cluster, request) for request in requests]
        total = sum(len(request.answer) for request in requests)
        self._disturb(disturbances, lambda: sum(len(stream.token_ids) for stream in streams) / total)
        self.check_answers(streams)

    def check_answers(self, streams: Sequence[Stream]) -> None:
        """Waits for the answers and compares them."""
        deadline = time.monotonic() + STREAMS_TIMEOUT_S
        for stream in streams:
            stream.join(deadline)
        wrong = [text for stream in streams if (text := stream.wrong())]
        assert not wrong, "\n".join([*wrong, f"logs: {self.cluster.run_dir}"])

    def check_sound(self, request: KnownRequest, everything_lives: bool) -> None:
        """All is as before: nothing is held, every ledger agrees with itself, and the next request is served."""
        deadline = time.monotonic() + RECOVERY_TIMEOUT_S
        while everything_lives and not self.cluster.healthy():
            assert time.monotonic() < deadline, f"not healthy again; logs: {self.cluster.run_dir}"
            time.sleep(0.2)
        served = Stream(self.cluster, request)
        served.join(time.monotonic() + RECOVERY_TIMEOUT_S)
        assert not served.wrong(), f"afterwards: {served.wrong()}; logs: {self.cluster.run_dir}"
        self.cluster.wait_until_no_block_is_held(RECOVERY_TIMEOUT_S)
        self.check_ledgers()

    def check_ledgers(self) -> None:
        """Every daemon answers, the ones that died under their new address, and finds nothing wrong with its ledger."""
        deadline = time.monotonic() + RECOVERY_TIMEOUT_S
        unchecked = set(DAEMONS)
        while unchecked:
            assert time.monotonic() < deadline, f"no answer from {unchecked}; logs: {self.cluster.run_dir}"
            for daemon in self.cluster.status().kvdaemons:
                name = daemon.kvdaemon_id
                if name in unchecked and (pool := ask_pool(daemon.address)) is not None:
                    assert not pool.violations, f"{name}: {list(pool.violations)}; logs: {self.cluster.run_dir}"
                    unchecked.remove(name)

    def events(self) -> Counter[str]:
        """How often what was logged since the last call, by message; admissions with blocks elsewhere as "spilled"."""
        counts: Counter[str] = Counter()
        for file in self.cluster.run_dir.glob("logs/*.log"):
            with file.open("rb") as log:
                log.seek(self._log_offsets.get(file, 0))
                for line in log:
                    if not line.startswith(b"{"):
                        continue
                    entry = json.loads(line)
                    counts[entry.get("message", "").partition(":")[0]] += 1
                    counts["spilled"] += bool(entry.get("remote_blocks"))
                self._log_offsets[file] = log.tell()
        return counts

    def _disturb(self, disturbances: Sequence[Disturbance], progress: Callable[[], float]) -> None:
        """Carries out the disturbances; answers when every stopped process goes on."""
        latest = time.monotonic() + TRIGGER_TIMEOUT_S
        for disturbance in disturbances:
            while progress() < disturbance.progress and time.monotonic() < latest:
                self._pause(0.01)
            self._pause(disturbance.delay_s)
            self._harm(disturbance)
        while self._stopped:
            self._pause(0.05)

    def _harm(self, disturbance: Disturbance) -> None:
        pid = self.cluster.pids().get(disturbance.process)
        if pid is None:  # dead already, by an earlier disturbance
            return
        if disturbance.stop_s is None:
            os.kill(pid, signal.SIGKILL)
        else:
            send_signal(pid, signal.SIGSTOP)
            self._stopped.append((time.monotonic() + disturbance.stop_s, disturbance.process, pid))

    def _pause(self, seconds: float) -> None:
        """Waits, and lets stopped processes go on in time."""
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            self._continue(now)
            time.sleep(min(0.02, until - now))

    def _continue(self, now: float) -> None:
        for entry in [entry for entry in self._stopped if entry[0] <= now]:
            self._stopped.remove(entry)
            _, process, pid = entry
            if self.cluster.pids().get(process) == pid:  # it may have been killed meanwhile
                os.kill(pid, signal.SIGCONT)


def ask_pool(address: str) -> pb.GetPoolResponse | None:
    """What a daemon says of its pool; None where none answers there."""
    try:
        with grpc.insecure_channel(address) as channel:
            return KvDaemonServiceStub(channel).GetPool(pb.GetPoolRequest(), timeout=2.0)
    except grpc.RpcError:
        return None
