"""Which KV daemon Kubernetes gives up first: the emptiest.

A ReplicaSet that shrinks deletes the pods of the lowest ``pod-deletion-cost`` first. The leading gManager keeps that
annotation of each daemon's pod at the daemon's fill in per cent. Writes are few: a cost is written when it is off by
several per cent, or wrong about whether the daemon is empty.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from services.core.errors import UnavailableError
from services.gmanager.config import KubernetesConfig
from services.gmanager.view import ClusterView, KvDaemonInfo

if TYPE_CHECKING:
    from services.runtime.kubernetes_api import Pods, PodState

logger = logging.getLogger(__name__)

STEP_PERCENT = 5
MAX_WRITES = 50  # in one round


def costs(daemons: tuple[KvDaemonInfo, ...]) -> dict[str, int]:
    """For each daemon that has said so, how much of its pool requests hold, in per cent, rounded up."""
    filled = {}
    for daemon in daemons:
        stats = daemon.stats
        if stats is not None:
            held = stats.total - stats.available
            filled[daemon.member.member_id] = -(-100 * held // stats.total) if stats.total else 0
    return filled


def due(pods: Mapping[str, PodState], wanted: Mapping[str, int]) -> list[tuple[PodState, int]]:
    """The costs to write now, most wrong first. Pods are named as their daemons are."""
    found = []
    for name, cost in wanted.items():
        pod = pods.get(name)
        if pod is None or pod.ending or pod.deletion_cost == cost:
            continue
        known = pod.deletion_cost
        error = 100 if known is None else abs(known - cost)
        if error >= STEP_PERCENT or (known == 0) != (cost == 0):
            found.append((error, name, pod, cost))
    found.sort(key=lambda entry: (-entry[0], entry[1]))
    return [(pod, cost) for _, _, pod, cost in found[:MAX_WRITES]]


def deletion_cost_tasks(
    config: KubernetesConfig | None, view: ClusterView, leads: Callable[[], bool]
) -> list[asyncio.Task[None]]:
    """The task that keeps the costs while ``leads`` says so, or none where there is no Kubernetes.

    Raises:
        ConfigError: this process cannot talk to an API server at all.
    """
    if config is None:
        return []
    from services.runtime.kubernetes_api import Pods, connect_in_cluster  # large: only for those who use it

    pods = Pods(connect_in_cluster(), config.namespace, config.pod_selector)
    return [asyncio.create_task(keep_deletion_costs(pods, config.interval_s, view, leads), name="deletion costs")]


async def keep_deletion_costs(pods: Pods, interval_s: float, view: ClusterView, leads: Callable[[], bool]) -> None:
    """Writes what is due, again and again until cancelled."""
    pods.start()
    try:
        while True:
            await asyncio.sleep(interval_s)
            if leads():
                await write_costs(pods, due(pods.latest, costs(view.kvdaemons(time.monotonic()))))
    finally:
        pods.close()


async def write_costs(pods: Pods, writes: list[tuple[PodState, int]]) -> None:
    """One round of writes. It ends when the API server is away or busy; the next round will see what is due then."""
    for pod, cost in writes:
        try:
            await asyncio.to_thread(pods.set_deletion_cost, pod, cost)
        except UnavailableError as exc:
            logger.warning("%s", exc)
            return
