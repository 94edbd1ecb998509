"""``python -m benchmarks.telemetry_cost``: what do traces and metrics cost in throughput?

Two clusters of one instance with a model of almost nothing, so that what is not the model weighs as much as it can. One
traces a request in a hundred, sends the spans to a collector, and is scraped as it serves; the other does neither.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import statistics
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Self

from benchmarks.checkpoints import random_prompt, write_random_checkpoint
from benchmarks.harness import Run, main
from benchmarks.http_load import Ask, send_load
from benchmarks.otlp_collector import OtlpCollector
from benchmarks.peers.ours import our_command
from benchmarks.peers.server import PinnedServer, Serving
from benchmarks.token_path import SHAPE
from services.core.errors import InfiniteLLMError
from services.launcher.options import SERVICE_KINDS

QUESTION = "what do traces of 1 % of the requests and metrics cost in throughput?"
SAMPLING_RATIO = 0.01
SCRAPE_INTERVAL_S = 5.0  # the deployed Prometheus does so every 15
STREAMS = 64
PROMPT_TOKENS = 64
OUTPUT_TOKENS = 384
REPETITIONS = 15
GOAL = 0.98
_KV_BYTES = 256 << 20
_SEED = 9000
_TIMEOUT_S = 10.0


def measure(run: Run) -> None:
    """Loads both clusters in turn."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})  # load, collector and scraper: another machine's, where there are several
    try:
        with tempfile.TemporaryDirectory(prefix="telemetry-cost-") as temporary, ExitStack() as stack:
            directory = Path(temporary)
            write_random_checkpoint(directory / SHAPE.name, SHAPE)
            serving = Serving(directory / SHAPE.name, (cores[0],), 4096, STREAMS, _KV_BYTES)
            collector = stack.enter_context(OtlpCollector())
            servers = []
            for name, settings in (("on", _on(collector)), ("off", _off())):
                run.progress.update(f"starting the cluster with telemetry {name}")
                (directory / name).mkdir()
                command = our_command(serving, directory / name, settings)
                servers.append(stack.enter_context(PinnedServer(command, serving.cores, directory / f"{name}.log")))
            _measure(run, dict(zip(("on", "off"), servers, strict=True)), collector)
    except InfiniteLLMError as error:
        raise SystemExit(f"telemetry_cost: {error}") from error
    finally:
        os.sched_setaffinity(0, cores)


def _on(collector: OtlpCollector) -> dict[str, dict[str, object]]:
    tracing = {"endpoint": collector.endpoint, "sampling_ratio": SAMPLING_RATIO}
    return {kind: {"tracing": tracing} for kind in SERVICE_KINDS}


def _off() -> dict[str, dict[str, object]]:
    return {kind: {"metrics_listen": None} for kind in SERVICE_KINDS if kind != "gateway"}


def _measure(run: Run, servers: Mapping[str, PinnedServer], collector: OtlpCollector) -> None:
    draw = random.Random(_SEED)
    output_tokens = 16 if run.quick else OUTPUT_TOKENS
    rates: dict[str, list[float]] = {name: [] for name in servers}
    requests = scrapes = 0
    for turn in run.rounds(REPETITIONS):
        asks = [Ask(random_prompt(SHAPE, PROMPT_TOKENS, draw), output_tokens) for _ in range(STREAMS)]
        requests += STREAMS
        for name, server in turn.order(tuple(servers.items())):
            run.progress.update(f"{turn.label}: telemetry {name}")
            # Both share a core: the one that is not scraped must not feel that the other is.
            with Scraper(server.address) if name == "on" else nullcontext() as scraper:
                load = asyncio.run(send_load(server.address, server.model, asks))
            scrapes += scraper.scrapes if scraper is not None else 0
            if turn.recorded:
                rates[name].append(load.output_tokens_per_s)
    ratios = [on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
    for name, measured in rates.items():
        run.row(
            {
                "telemetry": name,
                "tokens_per_s": statistics.median(measured),
                "spread": max(measured) - min(measured),
                "repetitions": len(measured),
            }
        )
    traced = {span.trace_id for span in collector.spans}
    run.summary("traced_requests", len(traced))
    run.summary("requests", requests)
    run.summary("spans", len(collector.spans))
    run.summary("scrapes", scrapes)
    run.summary("on_over_off_spread", max(ratios) - min(ratios))
    run.target("on_over_off", statistics.median(ratios), at_least=GOAL)


class Scraper:
    """Scrapes every process of a cluster at an interval, as a Prometheus does, while the block lasts.

    Attributes:
        scrapes: answered, of all processes together.
    """

    def __init__(self, gateway: str) -> None:
        self.scrapes = 0
        self._gateway = gateway
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scraper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_TIMEOUT_S)

    def _run(self) -> None:
        targets = json.loads(_get(self._gateway, "/metrics/targets"))
        addresses = [address for target in targets for address in target["targets"]]
        while not self._stop.is_set():
            for address in addresses:
                _get(address, "/metrics")
                self.scrapes += 1
            self._stop.wait(SCRAPE_INTERVAL_S)


def _get(address: str, path: str) -> bytes:
    connection = http.client.HTTPConnection(address, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main("telemetry_cost", QUESTION, measure))
