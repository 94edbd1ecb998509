"""A running cluster whose blocks a test moves, as the gManager would."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Sequence
from uuid import uuid4

import grpc
from cluster_process import Cluster

from infinitellm.internal.v1 import instance_pb2, instance_pb2_grpc, kvdaemon_pb2, kvdaemon_pb2_grpc

TOKEN = 1 << 40  # later than any leader that is elected here: what the gManager itself wants is refused
DEADLINE_S = 60.0


class Stream:
    """One completion, streamed in a thread."""

    def __init__(self, cluster: Cluster, prompt: Sequence[int], max_tokens: int) -> None:
        self.token_ids: list[int] = []
        self._cluster = cluster
        self._prompt, self._max_tokens = list(prompt), max_tokens
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait_for_tokens(self, count: int) -> None:
        """Until so many have come in all."""
        deadline = time.monotonic() + DEADLINE_S
        while len(self.token_ids) < count:
            assert self.running, f"ended early: {self._failure}\n{self._cluster.logs()}"
            assert time.monotonic() < deadline, self._cluster.logs()
            time.sleep(0.01)

    def wait_for_more(self, count: int) -> None:
        self.wait_for_tokens(len(self.token_ids) + count)

    def finish(self) -> list[int]:
        self._thread.join(150)
        assert not self.running, f"the stream hangs at {len(self.token_ids)}\n{self._cluster.logs()}"
        assert self._failure is None, f"{self._failure}\n{self._cluster.logs()}"
        return self.token_ids

    def _run(self) -> None:
        try:
            for chunk in self._cluster.stream(self._prompt, max_tokens=self._max_tokens, ignore_eos=True):
                self.token_ids += chunk["choices"][0].get("token_ids") or []  # type: ignore[index]
        except BaseException as failure:
            self._failure = failure


class Mover:
    """Gives move instructions to the instances of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.addresses = {daemon.kvdaemon_id: daemon.address for daemon in cluster.status().kvdaemons}

    def requests(self, count: int = 1) -> list[tuple[str, str]]:
        """(request id, address of its instance) of the running requests, once there are so many."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            status = self.cluster.status()
            instances = {instance.instance_id: instance.address for instance in status.instances}
            if len(status.requests) >= count:
                return [(request.request_id, instances[request.instance_id]) for request in status.requests]
            assert time.monotonic() < deadline, self.cluster.logs()
            time.sleep(0.05)

    def instruct(
        self, request: tuple[str, str], source: str, destination: str, blocks: int, **fields: object
    ) -> instance_pb2.MoveBlocksResponse:
        """The instance's answer. ``fields``: of the message, where they are to be others."""
        values = {
            "move_id": uuid4().hex,
            "fencing_token": TOKEN,
            "request_id": request[0],
            "source_kvdaemon_id": source,
            "destination_kvdaemon_id": destination,
            "destination_address": self.addresses.get(destination, ""),
            "num_blocks": blocks,
            **fields,
        }
        with grpc.insecure_channel(request[1]) as channel:
            stub = instance_pb2_grpc.InstanceServiceStub(channel)
            return stub.MoveBlocks(instance_pb2.MoveBlocksRequest(**values), timeout=DEADLINE_S)  # type: ignore[arg-type]

    def move(self, request: tuple[str, str], source: str, destination: str, blocks: int) -> None:
        """Moves so many blocks, and waits until they lie there."""
        move_id = uuid4().hex
        answer = self.instruct(request, source, destination, blocks, move_id=move_id)
        assert (answer.accepted_blocks, answer.refusal) == (blocks, ""), self.cluster.logs()
        assert self.end_of(move_id) == (blocks, "DONE")

    def end_of(self, move_id: str) -> tuple[int, str]:
        """(moved blocks, how it ended) of a move, by the word of its instance's log."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for log in self.cluster.run_dir.rglob("instance-*.log"):
                for line in log.read_text(errors="replace").splitlines():
                    if "move ended" in line and re.search(rf"\b{move_id}\b", line):
                        blocks, end = re.search(r"blocks\W+(\d+)", line), re.search(r"end\W+([A-Z_]+)", line)
                        assert blocks is not None, line
                        assert end is not None, line
                        return int(blocks[1]), end[1]
            assert time.monotonic() < deadline, self.cluster.logs()
            time.sleep(0.02)

    def written_on_behalf(self, kvdaemon_id: str) -> bool:
        """Whether another daemon has ever come to write blocks to this one."""
        logs = self.cluster.run_dir.rglob(f"{kvdaemon_id}.log")
        lines = itertools.chain.from_iterable(log.read_text(errors="replace").splitlines() for log in logs)
        return any("data connection accepted" in line and "writer" in line for line in lines)

    def check_ledgers(self) -> None:
        """Nothing is held, and every ledger is sound."""
        self.cluster.wait_until_no_block_is_held()
        for daemon in self.cluster.status().kvdaemons:
            with grpc.insecure_channel(daemon.address) as channel:
                stub = kvdaemon_pb2_grpc.KvDaemonServiceStub(channel)
                pool = stub.GetPool(kvdaemon_pb2.GetPoolRequest(), timeout=10.0, wait_for_ready=True)
            assert list(pool.violations) == [], daemon.kvdaemon_id
