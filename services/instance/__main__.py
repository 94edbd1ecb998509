"""``python -m services.instance --config FILE``: runs one instance until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from infinitellm.internal.v1.instance_pb2_grpc import add_InstanceServiceServicer_to_server
from services.core.errors import ConfigError, InfiniteLLMError, UnavailableError
from services.dataplane.device import Device
from services.dataplane.devices import open_device
from services.dataplane.pool_socket import map_pool
from services.instance.assembly import assemble, size_workspace
from services.instance.config import InstanceConfig
from services.instance.control import Stop
from services.instance.engine import Engine
from services.instance.engine_metrics import EngineMetrics
from services.instance.metrics import InstanceState
from services.instance.model import Model, load_model
from services.instance.passes.apply import apply_passes
from services.instance.probe import probe
from services.instance.recorded_model import record_steps
from services.instance.servicer import InstanceServicer
from services.rmanager.daemon_client import DaemonSession
from services.rmanager.gmanager_client import GManagerClient
from services.rmanager.gmanager_locator import GManagerLocator
from services.rmanager.heartbeat import HeartbeatSender
from services.runtime.config import load_config
from services.runtime.etcd import EtcdClient
from services.runtime.grammars import Grammars
from services.runtime.grpc_server import bind, make_server
from services.runtime.health import HealthPort
from services.runtime.logs import setup_logging
from services.runtime.membership import Member, Membership
from services.runtime.metrics_port import MetricsPort, make_registry
from services.runtime.tracing import make_tracing
from services.runtime.vllm_names import with_vllm_names

_log = logging.getLogger("services.instance")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m services.instance", description="One instance of infinite-llm.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file; keys as in services/instance/config.py")
    arguments = parser.parse_args()
    try:
        config = load_config(InstanceConfig, arguments.config)
        setup_logging("instance", config.member_id)
        torch.set_num_threads(config.num_threads)
        device = open_device(config.device)
        model = load_model(config.model, config.dtype, config.max_model_len, device.tensors)
        probe(model, device.load_kernels(config.num_threads), config.block_tokens, config.dtype)
        apply_passes(model, config.passes, config.num_threads)
        if config.record_steps:
            record_steps(model, device, config.max_num_seqs)
        device.trim()
        asyncio.run(serve(config, model, device))
    except InfiniteLLMError as error:
        sys.exit(f"infinite-llm instance: {error}")


async def serve(config: InstanceConfig, model: Model, device: Device) -> None:
    """Runs the instance until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
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
        await asyncio.sleep(0.2)
    raise UnavailableError(
        f"kvdaemon {config.local_kvdaemon_id} did not open a session within {config.startup_timeout_s:g} s: {why}"
    )


def _end(reason: str) -> None:
    """Ends the process at once: its pool, or its right to it, is gone. It is started anew with the daemon's successor,
    and the gateways submit its requests elsewhere meanwhile."""
    _log.critical("ending", extra={"why": reason})
    os._exit(1)


def _run(engine: Engine) -> None:
    """The engine's thread. An error here is a bug; a process whose engine is dead must not look alive."""
    try:
        engine.run()
    except BaseException:
        _log.critical("the engine failed, ending", exc_info=True)
        os._exit(1)


if __name__ == "__main__":
    main()
