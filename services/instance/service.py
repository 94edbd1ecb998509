"""The process of one instance: made from its configuration, run until SIGTERM or SIGINT, ended in order."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from infinitellm.internal.v1.instance_pb2_grpc import add_InstanceServiceServicer_to_server
from services.core.errors import ConfigError, UnavailableError
from services.dataplane.device import Device
from services.dataplane.devices import open_device
from services.dataplane.pool_socket import map_pool
from services.instance.assembly import assemble, size_workspace
from services.instance.config import InstanceConfig
from services.instance.control import Stop
from services.instance.engine import Engine
from services.instance.engine_metrics import EngineMetrics
from services.instance.loading import prepare_model, prepare_part
from services.instance.metrics import InstanceState
from services.instance.model import Model, check_tensor_parallel
from services.instance.ranks.leader import Ranks
from services.instance.servicer import InstanceServicer
from services.rmanager.daemon_client import DaemonSession
from services.rmanager.gmanager_client import GManagerClient
from services.rmanager.gmanager_locator import GManagerLocator
from services.rmanager.heartbeat import HeartbeatSender
from services.runtime.etcd import EtcdClient
from services.runtime.grammars import Grammars
from services.runtime.grpc_server import bind, make_server
from services.runtime.health import HealthPort
from services.runtime.membership import Member, Membership
from services.runtime.metrics_port import MetricsPort, make_registry
from services.runtime.process import CLOSE_WITHIN_S, stop_event
from services.runtime.tracing import make_tracing
from services.runtime.vllm_names import with_vllm_names

_log = logging.getLogger("services.instance")


def run(config: InstanceConfig, config_file: Path) -> None:
    """Loads the model and runs the instance until SIGTERM or SIGINT.

    Raises:
        InfiniteLLMError: it cannot begin.
    """
    device = open_device(config.device)
    model, ranks = _prepare(config, config_file, device)
    device.trim()
    asyncio.run(serve(config, model, device, ranks))


def _prepare(config: InstanceConfig, config_file: Path, device: Device) -> tuple[Model, Ranks | None]:
    """The model, and the processes that compute it together with this one, if there are any."""
    if config.tensor_parallel == 1:
        return prepare_model(config, device), None
    check_tensor_parallel(config.model, config.tensor_parallel)
    ranks = Ranks(config_file, config, _end)
    model = prepare_part(config, device, 0, ranks.store)
    ranks.await_ready()
    return model, ranks


async def serve(config: InstanceConfig, model: Model, device: Device, ranks: Ranks | None) -> None:
    """Runs the instance until SIGTERM or SIGINT."""
    stop = stop_event(CLOSE_WITHIN_S)
    etcd = EtcdClient(config.etcd, config.etcd_tls)
    membership = Membership(etcd, config.cluster)
    locator = GManagerLocator(membership)
    gmanager = GManagerClient(locator.address, config.tls)
    grammars = Grammars(config.model, model.shape.vocab_size)
    servicer = InstanceServicer(model.shape.vocab_size, model.shape.max_model_len, grammars)

    local = await _open_local(config, membership, model, lambda reason: None if stop.is_set() else _end(reason))
    opened = local.opened
    deadline = time.monotonic() + config.call_timeout_s
    pool = await asyncio.to_thread(map_pool, Path(opened.pool_socket), opened.session_id, deadline, device)
    if ranks is not None:
        ranks.share_pool(pool)
    size = size_workspace(config, opened.total_blocks)
    workspace = await local.reserve(size.blocks, size.blocks, workspace=True)
    if not workspace:
        raise ConfigError(
            f"the pool of kvdaemon {config.local_kvdaemon_id} has no room for this instance's {size.blocks} work blocks"
        )
    registry = make_registry()
    tracing = make_tracing(config.tracing, "instance", config.member_id, config.cluster)
    parts = assemble(
        config,
        model,
        device,
        local,
        pool,
        workspace,
        size.max_num_seqs,
        gmanager,
        servicer.publish,
        _end,
        EngineMetrics(registry),
        tracing.tracer,
        grammars,
        ranks,
    )
    parts.rmanager.moves.leader_token = lambda: locator.fencing_token
    registry.register(InstanceState(config.member_id, parts.board, parts.peers, local))
    served = with_vllm_names(registry, model.shape.name) if config.vllm_metric_names else registry
    metrics = MetricsPort(config.metrics_listen, served, config.allow_insecure)
    thread = threading.Thread(target=_run, args=(parts.engine,), name="engine", daemon=True)
    thread.start()
    servicer.serve(parts.engine, parts.rmanager.moves)
    server = make_server(config.tls, tracing.tracer)
    add_InstanceServiceServicer_to_server(servicer, server)
    address = bind(server, config.listen, tls=config.tls, allow_insecure=config.allow_insecure)
    await server.start()
    metrics.start()
    heartbeat = HeartbeatSender(
        f"instance/{config.member_id}",
        locator,
        parts.board.for_heartbeat,
        config.heartbeat_interval_s,
        parts.engine.timings.drain,
        tls=config.tls,
    )
    heartbeat.start()
    registration = await membership.register(
        Member(
            kind="instance",
            member_id=config.member_id,
            address=address,
            model=model.shape.name,
            max_model_len=model.shape.max_model_len,
            local_kvdaemon_id=config.local_kvdaemon_id,
            epoch=time.time_ns(),
            metrics_address=metrics.address,
        )
    )
    health = HealthPort(
        config.health_listen,
        lambda: time.monotonic() - parts.board.put_at < config.stall_timeout_s,
        lambda: registration.entered and not stop.is_set(),
    )
    await health.start()
    _log.info("serving", extra={"address": address, "workspace": size.blocks, "max_num_seqs": size.max_num_seqs})

    await stop.wait()
    _log.info("stopping")
    await heartbeat.close()  # first: who sends heartbeats counts as a member without an entry, too
    await registration.close()
    servicer.stop()
    await server.stop(grace=2.0)
    parts.engine.post(Stop())
    await asyncio.to_thread(thread.join, config.call_timeout_s)
    if ranks is not None:
        await asyncio.to_thread(ranks.close)
    await parts.rmanager.close()
    await local.close()
    await gmanager.close()
    await locator.close()
    await etcd.close()
    await metrics.close()
    await health.close()
    await asyncio.to_thread(tracing.close)


async def _open_local(
    config: InstanceConfig, membership: Membership, model: Model, on_fatal: Callable[[str], None]
) -> DaemonSession:
    """The session with the daemon on this host; waits for it to appear.

    Raises:
        UnavailableError: it did not within startup_timeout_s.
    """
    geometry = model.shape.geometry(config.block_tokens, config.dtype)
    deadline = time.monotonic() + config.startup_timeout_s
    why = "it is not registered in etcd"
    while time.monotonic() < deadline:
        try:
            member = (await membership.list("kvdaemon", config.call_timeout_s)).get(config.local_kvdaemon_id)
            if member is not None:
                session = DaemonSession(
                    member.member_id,
                    member.address,
                    instance_id=config.member_id,
                    epoch=time.time_ns(),
                    geometry=geometry,
                    mapped=True,
                    on_lost=lambda _, reason: on_fatal(f"local kvdaemon lost: {reason}"),
                    call_timeout_s=config.call_timeout_s,
                    tls=config.tls,
                )
                await session.open()
                return session
        except UnavailableError as error:
            why = str(error)
        await asyncio.sleep(0.05)
    raise UnavailableError(
        f"kvdaemon {config.local_kvdaemon_id} did not open a session within {config.startup_timeout_s:g} s: {why}"
    )


def _end(reason: str) -> None:
    """Ends the process at once: its pool, its right to it, or one of its ranks is gone. It is started anew, with the
    daemon's successor or with new ranks, and the gateways submit its requests elsewhere meanwhile."""
    _log.critical("ending", extra={"why": reason})
    os._exit(1)


def _run(engine: Engine) -> None:
    """The engine's thread. An error here is a bug; a process whose engine is dead must not look alive."""
    try:
        engine.run()
    except BaseException:
        _log.critical("the engine failed, ending", exc_info=True)
        os._exit(1)
