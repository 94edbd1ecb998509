"""One engine in this process, over a pool of its own: for measuring its steps and nothing around them.

The control plane is short-circuited: the pool has no ledger, orders are answered at once, in the engine's own thread.
"""

from __future__ import annotations

from collections.abc import Callable

import kernels
from services.core.blocks import BlockHandle, BlockKeySpace, BlockRef
from services.core.errors import ContextTooLongError
from services.dataplane.kv_pool import KvPool
from services.dataplane.negotiation import Offers
from services.dataplane.peers import PeerSet
from services.dataplane.remote_attention import RemoteAttention
from services.dataplane.select import connecting_transport
from services.dataplane.transport import Limits
from services.instance.control import (
    LocalSealed,
    Order,
    PromptRefused,
    PromptReserved,
    Release,
    Replenish,
    Replenished,
    ReservePrompt,
    SealLocal,
    Stop,
)
from services.instance.dist_attention import DistAttention
from services.instance.engine import Engine
from services.instance.memory import BlockMemory
from services.instance.model import Model
from services.instance.outputs import FinishOutput, Output
from services.instance.scheduler import Scheduler

_LOCAL = "local"
_SESSION = 1


class LocalEngine:
    """An engine for requests that run at the same time. ``run`` computes them in the calling thread.

    Args:
        dtype: of the model and its KV cache.
        context: tokens of a request at most, prompt and answer.
        publish: gets a step's outputs.
    """

    def __init__(
        self,
        model: Model,
        dtype: str,
        *,
        num_threads: int,
        max_num_seqs: int,
        max_batch_tokens: int,
        context: int,
        publish: Callable[[list[Output]], None],
    ) -> None:
        self._publish = publish
        self._unfinished = 0
        geometry = model.shape.geometry(64, dtype)
        chunks = 2 * (geometry.blocks_for(max_batch_tokens) + 1)
        blocks = chunks + max_num_seqs * (geometry.blocks_for(context) + 1)
        self._free = [BlockHandle(block, 1) for block in range(blocks)]
        pool = KvPool(blocks * geometry.block_bytes).as_tensor(geometry)
        attention_kernels = kernels.load("cpu", num_threads)
        limits = Limits(1 << 20, 8 << 20)  # there are no peers
        peers = PeerSet(connecting_transport("shm", None), limits, query_room=1 << 20)
        remote = RemoteAttention(peers, attention_kernels, dtype, timeout_s=60.0)
        self.attention = DistAttention(attention_kernels, pool, remote)
        self.attention.attach_to(model.module)
        keys = BlockKeySpace(model.shape.fingerprint, dtype, (0, geometry.kv_heads))
        workspace = self._take(chunks)
        memory = BlockMemory(
            geometry, keys, model.rotary, pool, workspace, _LOCAL, _SESSION, peers, remote, self, Offers(), 1.0
        )
        scheduler = Scheduler(max_num_seqs, max_batch_tokens)
        self.engine = Engine(
            model, self.attention, remote, peers, memory, scheduler, self, self._take_outputs, lambda _: None
        )

    def run(self, requests: int) -> None:
        """Computes until so many requests have finished; an engine runs once."""
        self._unfinished = requests
        self.engine.run()

    def order(self, order: Order) -> None:
        match order:
            case ReservePrompt(age, attempt, _, full_blocks):
                if full_blocks >= len(self._free):
                    error = ContextTooLongError("more requests than this engine was made for")
                    self.engine.post(PromptRefused(age.request_id, attempt, error))
                else:
                    *local, tail = self._take(full_blocks + 1)
                    reserved = PromptReserved(age.request_id, attempt, (), tuple(local), (), BlockRef(_LOCAL, tail))
                    self.engine.post(reserved)
            case SealLocal(blocks):
                self.engine.post(LocalSealed(tuple((own, own) for own, _ in blocks)))
            case Replenish(count, _):
                self.engine.post(Replenished(tuple(self._take(count)), ()))
            case Release(_, _, handles):
                self._free += handles

    def _take(self, count: int) -> list[BlockHandle]:
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _take_outputs(self, outputs: list[Output]) -> None:
        self._publish(outputs)
        self._unfinished -= sum(isinstance(output, FinishOutput) for output in outputs)
        if self._unfinished == 0:
            self.engine.post(Stop())
