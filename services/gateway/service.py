"""The process of one gateway: made from its configuration, run until SIGTERM or SIGINT, ended in order."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from pathlib import Path

from infinitellm.v1 import cluster_pb2_grpc, inference_pb2_grpc
from services.core.errors import ConfigError
from services.gateway.chat_template import load_chat_template
from services.gateway.checkpoint import load_checkpoint
from services.gateway.config import GatewayConfig
from services.gateway.generation_service import GenerationService
from services.gateway.gmanager_client import GManagerClient
from services.gateway.http_api import Readiness, make_app
from services.gateway.journal import NoJournal, RedisJournal
from services.gateway.members import Members
from services.gateway.metrics import GatewayState
from services.gateway.request_metrics import RequestMetrics
from services.gateway.router import Router
from services.gateway.servicer import ClusterServicer, InferenceServicer
from services.gateway.tokenizer import load_tokenizer
from services.rmanager.gmanager_locator import GManagerLocator
from services.runtime.addresses import split_address
from services.runtime.api_keys import ApiKeys
from services.runtime.config import load_config
from services.runtime.etcd import EtcdClient
from services.runtime.grpc_server import bind, make_server
from services.runtime.health import HealthPort
from services.runtime.http_server import HttpServer
from services.runtime.logs import setup_logging
from services.runtime.membership import Member, Membership
from services.runtime.metrics_port import make_registry, metrics_route
from services.runtime.process import CLOSE_WITHIN_S, stop_event
from services.runtime.tracing import make_tracing
from services.runtime.version import version
from services.runtime.vllm_names import with_vllm_names

logger = logging.getLogger(__name__)


def readiness(config: GatewayConfig, gmanager: GManagerClient, router: Router, members: Members) -> Readiness:
    """Compares what is there with what the configuration asks for."""
    instances, kvdaemons = router.ready_instances, len(members.of("kvdaemon"))
    missing = []
    if not gmanager.known:
        missing.append("gmanager: none has answered yet")
    if instances < config.ready_instances:
        missing.append(f"instances: {instances} of {config.ready_instances} are connected")
    if kvdaemons < config.ready_kvdaemons:
        missing.append(f"kvdaemons: {kvdaemons} of {config.ready_kvdaemons} are registered")
    return Readiness(instances, kvdaemons, tuple(missing))


def metrics_address(config: GatewayConfig, http_address: str) -> str:
    """Where others find /metrics: the port of HTTP, on the host that is advertised where one is."""
    host, _ = split_address(config.advertise or http_address)
    return f"{host}:{split_address(http_address)[1]}"


async def serve(config: GatewayConfig) -> None:
    """Serves until SIGTERM or SIGINT."""
    stop = stop_event(config.shutdown_grace_s + CLOSE_WITHIN_S)

    checkpoint = load_checkpoint(config.model, config.served_model_name, config.max_model_len)
    tokenizer = load_tokenizer(config.model, checkpoint.bos_token, config.tokenizer_threads)
    chat_template = load_chat_template(config.model)
    keys = None if config.api_keys is None else ApiKeys(config.api_keys)
    etcd = EtcdClient(config.etcd, config.etcd_tls)
    membership = Membership(etcd, config.cluster)
    locator = GManagerLocator(membership)
    router = Router(config.member_id, config.stream_timeout_s, config.tls)
    gmanager = GManagerClient(locator, router.set_instances, config.tls)
    members = Members(membership)
    journal = (
        NoJournal()
        if config.redis_url is None
        else RedisJournal(
            config.redis_url, config.cluster, config.member_id, config.journal_ttl_s, config.journal_buffer_bytes
        )
    )
    registry = make_registry()
    tracing = make_tracing(config.tracing, "gateway", config.member_id, config.cluster)
    service = GenerationService(
        checkpoint,
        tokenizer,
        router,
        journal,
        config.instance_wait_s,
        config.max_failovers,
        config.max_queue,
        RequestMetrics(registry),
        tracing.tracer,
    )
    registry.register(GatewayState(service, router, journal))
    served = with_vllm_names(registry, checkpoint.name) if config.vllm_metric_names else registry

    grpc_server = make_server(config.tls, tracing.tracer)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(service, keys), grpc_server)
    cluster_pb2_grpc.add_ClusterServiceServicer_to_server(ClusterServicer(gmanager, checkpoint.name, keys), grpc_server)
    grpc_address = bind(grpc_server, config.grpc_listen, tls=config.tls, allow_insecure=config.allow_insecure)

    def state() -> Readiness:
        return readiness(config, gmanager, router, members)

    app = make_app(
        service,
        chat_template,
        keys,
        state,
        version(),
        config.max_body_bytes,
        [metrics_route(served), members.targets_route()],
    )
    http = HttpServer(app, config.http_listen, config.shutdown_grace_s, config.allow_insecure)
    health = HealthPort(config.health_listen, lambda: True, lambda: not (stop.is_set() or state().missing))
    await grpc_server.start()
    await health.start()
    tasks = [http.start(), *members.tasks, asyncio.create_task(stop.wait())]
    member = Member(
        "gateway",
        config.member_id,
        config.advertise or grpc_address,
        model=checkpoint.name,
        epoch=time.time_ns(),
        metrics_address=metrics_address(config, http.address),
    )
    registration = await membership.register(member, ttl_s=config.lease_ttl_s)
    logger.info("serving", extra={"http": http.address, "grpc": grpc_address, "model": checkpoint.name})
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    finally:
        await registration.close()
        await asyncio.gather(http.close(), grpc_server.stop(grace=config.shutdown_grace_s))
        for task in tasks:
            task.cancel()
        await gmanager.close()
        await locator.close()
        await router.close()
        await journal.close()
        await etcd.close()
        await health.close()
        tokenizer.close()
        await asyncio.to_thread(tracing.close)
        logger.info("stopped")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.gateway", description="One gateway of infinite-llm.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file; keys in services/gateway/config.py")
    arguments = parser.parse_args()
    try:
        config = load_config(GatewayConfig, arguments.config)
        setup_logging("gateway", config.member_id, config.log_level)
        asyncio.run(serve(config))
    except ConfigError as exc:
        print(f"gateway: {exc}", file=sys.stderr)
        return 2
    return 0
