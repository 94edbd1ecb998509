"""Puts an instance's parts together once its model is loaded and its local pool is mapped."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from opentelemetry.trace import Tracer
from torch import Tensor

from services.core.blocks import BlockHandle, BlockKeySpace
from services.core.errors import ConfigError
from services.core.placement import BlockCount, InstanceSnapshot, MoveReport, PeerTransport
from services.dataplane.device import Device
from services.dataplane.peers import PeerSet
from services.dataplane.pool_socket import MappedPool
from services.dataplane.remote_attention import RemoteAttention
from services.dataplane.select import connecting_transport
from services.dataplane.transport import Limits
from services.dataplane.wire import Role
from services.instance.config import InstanceConfig
from services.instance.control import Order
from services.instance.dist_attention import DistAttention
from services.instance.engine import Engine
from services.instance.engine_metrics import EngineMetrics
from services.instance.engine_traces import EngineTraces, NoTraces
from services.instance.forward import Forward
from services.instance.memory import BlockMemory
from services.instance.model import TORCH_DTYPES, Model
from services.instance.outputs import EngineSnapshot, Output
from services.instance.ranks.forward import RankedForward
from services.instance.ranks.leader import Ranks
from services.instance.ranks.lockstep import LockstepRemoteAttention
from services.instance.rmanager import RManager, RManagerSettings
from services.instance.scheduler import Scheduler
from services.rmanager.daemon_client import DaemonSession
from services.rmanager.gmanager_client import GManagerClient
from services.runtime.grammars import Grammars

_LOGITS_BYTES = 256 << 20  # of prompts whose log-probabilities are told, in one step
_WINDOW_WRITES = 8  # block writes that fit a daemon's window beside two steps' queries


@dataclass(frozen=True, slots=True)
class Workspace:
    """Open blocks of an instance and the number of sequences that they suffice for."""

    blocks: int
    max_num_seqs: int


def size_workspace(config: InstanceConfig, total_blocks: int) -> Workspace:
    """Two prefill chunks: one being computed, one on its way elsewhere. Each running sequence brings its tail's block.

    Raises:
        ConfigError: it would be more than half of the pool.
    """
    chunks = 2 * (-(-config.max_batch_tokens // config.block_tokens) + 1)
    if total_blocks < 2 * (chunks + 1):
        raise ConfigError(
            f"the pool of kvdaemon {config.local_kvdaemon_id} holds {total_blocks} rBlocks; this instance needs at "
            f"least {2 * (chunks + 1)}: raise the daemon's pool_mib, or lower max_batch_tokens "
            f"({config.max_batch_tokens})"
        )
    return Workspace(chunks, min(config.max_num_seqs, total_blocks - chunks))


@dataclass(slots=True)
class SnapshotBoard:
    """The engine's latest snapshot, for heartbeats. A single reference is swapped: no lock is needed.

    The engine puts one at every slow round of its loop, so ``put_at`` (monotonic) also tells whether it goes round.
    """

    local_kvdaemon_id: str
    max_running: int
    latest: EngineSnapshot = field(default_factory=EngineSnapshot)
    moves: Callable[[], tuple[MoveReport, ...]] = tuple  # ended lately
    transports: Callable[[], tuple[PeerTransport, ...]] = tuple  # of the daemons that are connected
    put_at: float = field(default_factory=time.monotonic)

    def put(self, snapshot: EngineSnapshot) -> None:
        self.latest = snapshot
        self.put_at = time.monotonic()

    def for_heartbeat(self) -> InstanceSnapshot:
        latest = self.latest
        placement = {
            request_id: {
                kvdaemon_id: BlockCount(count, kvdaemon_id == self.local_kvdaemon_id)
                for kvdaemon_id, count in blocks.items()
                if count
            }
            for request_id, blocks in latest.placement
        }
        return InstanceSnapshot(
            latest.running,
            latest.waiting,
            placement,
            latest.oldest_starving,
            self.moves(),
            self.max_running,
            latest.progress,
            latest.queue,
            self.transports(),
        )


class _OrderDesk:
    """Ties engine and rManager, which each need the other, together."""

    def __init__(self) -> None:
        self.rmanager: RManager | None = None

    def order(self, order: Order) -> None:
        assert self.rmanager is not None
        self.rmanager.order(order)


@dataclass(frozen=True, slots=True)
class Assembly:
    engine: Engine
    rmanager: RManager
    board: SnapshotBoard
    peers: PeerSet


@dataclass(frozen=True, slots=True)
class ComputeParts:
    """What a process computes steps with: the leader's has an engine around it, another rank's nothing."""

    peers: PeerSet
    remote: RemoteAttention
    attention: DistAttention


def assemble_compute(config: InstanceConfig, model: Model, pool: Tensor, device: Device) -> ComputeParts:
    """Attention over the local pool and over other daemons, for this process's part of the model.

    Args:
        pool: [num_blocks, layers, kv_heads, 2, block_tokens, head_dim], all heads.
    """
    part = model.part
    attention_kernels = device.load_kernels(config.num_threads)
    query_room, limits = _limits(config, model)
    peers = PeerSet(
        connecting_transport(config.transport, config.link, config.tls),
        limits,
        query_room,
        Role.OWNER if part.rank == 0 else Role.READER,
        part.heads(model.shape.kv_heads),
    )
    out_dtype = "float32" if config.ship_float32 else config.dtype
    kind = RemoteAttention if part.is_whole else LockstepRemoteAttention
    remote = kind(peers, attention_kernels, out_dtype, config.transfer_timeout_s, device)
    attention = DistAttention(attention_kernels, part.of_pool(pool), remote, device)
    attention.attach_to(model.module)
    return ComputeParts(peers, remote, attention)


def assemble(
    config: InstanceConfig,
    model: Model,
    device: Device,
    local: DaemonSession,
    pool: MappedPool,
    workspace: list[BlockHandle],
    max_num_seqs: int,
    gmanager: GManagerClient,
    publish: Callable[[list[Output]], None],
    on_fatal: Callable[[str], None],
    metrics: EngineMetrics,
    tracer: Tracer,
    grammars: Grammars,
    ranks: Ranks | None,
) -> Assembly:
    """Builds engine and rManager; called on the event loop. The engine does not run yet."""
    shape = model.shape
    geometry = shape.geometry(config.block_tokens, config.dtype)
    tensor = pool.as_tensor(geometry)
    compute = assemble_compute(config, model, tensor, device)
    peers, remote, attention = compute.peers, compute.remote, compute.attention
    forward = Forward(model, attention, remote, device)
    if ranks is not None:
        assert isinstance(remote, LockstepRemoteAttention)
        forward = RankedForward(model, attention, remote, device, peers, ranks)
    desk = _OrderDesk()
    keys = BlockKeySpace(shape.fingerprint, config.dtype, (0, shape.kv_heads))
    memory = BlockMemory(
        geometry,
        keys,
        model.rotary,
        tensor,
        workspace,
        local.kvdaemon_id,
        local.opened.session_id,
        peers,
        remote,
        desk,
        local.opened.offers,
        config.move_bytes_per_s,
        device,
    )
    scored_tokens = max(1, _LOGITS_BYTES // (shape.vocab_size * TORCH_DTYPES[config.dtype].itemsize))
    scheduler = Scheduler(max_num_seqs, config.max_batch_tokens, config.mixed_step_s, scored_tokens)
    board = SnapshotBoard(local.kvdaemon_id, max_num_seqs)
    traces = NoTraces() if config.tracing is None else EngineTraces(tracer)
    engine = Engine(
        model,
        attention,
        remote,
        peers,
        memory,
        scheduler,
        desk,
        publish,
        board.put,
        metrics,
        traces,
        grammars,
        device,
        forward,
    )
    settings = RManagerSettings(config.member_id, geometry, len(workspace), config.call_timeout_s, config.tls)
    rmanager = desk.rmanager = RManager(settings, local, gmanager, peers, engine.post, on_fatal, tracer)
    board.moves = lambda: rmanager.moves.reports
    board.transports = peers.transports
    return Assembly(engine, rmanager, board, peers)


def _limits(config: InstanceConfig, model: Model) -> tuple[int, Limits]:
    """Room for one step's plan and one layer's query, and the limits of a connection to a daemon.

    A discarded step's last query may still be under way when the next step begins, hence room for two. Only the leader
    of several ranks writes blocks.
    """
    shape, part = model.shape, model.part
    geometry = shape.geometry(config.block_tokens, config.dtype)
    heads = shape.q_heads // part.degree
    row_bytes = heads * (shape.head_dim * 4 + 4)  # float32 out and lse: at least as long as q
    query = config.max_batch_tokens * row_bytes
    plan = (1 << 16) + 64 * config.max_num_seqs + 24 * geometry.blocks_for(shape.max_model_len)
    block, writes = (geometry.block_bytes + 16, _WINDOW_WRITES) if part.rank == 0 else (0, 0)
    longest = max(query, plan, block) + 64
    query_room = 2 * (query + plan + 256)
    return query_room, Limits(longest, max(longest, query_room) + writes * (block + 64))
