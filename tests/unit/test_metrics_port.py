"""Where metrics are served: the port, the format, and what every process tells."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from scraped import Scraped

from services.core.errors import ConfigError
from services.runtime.metrics import GENERATION_TOKENS, STEP_PARTS
from services.runtime.metrics_port import MetricsPort, make_registry
from services.runtime.version import version
from services.runtime.vllm_names import with_vllm_names

# As a Prometheus writes it.
ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


def test_what_a_prometheus_gets() -> None:
    registry = make_registry()
    STEP_PARTS.counter(registry).labels("merge").inc(0.5)
    GENERATION_TOKENS.counter(registry).inc(7)

    async def scenario() -> None:
        port = MetricsPort("127.0.0.1:0", with_vllm_names(registry, "m"), allow_insecure=False)
        port.start()
        async with httpx.AsyncClient(base_url=f"http://{port.address}", timeout=20) as http:
            answer = await http.get("/metrics", headers={"accept": ACCEPT})
            assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            told = Scraped(answer.text)
            assert told.value("vllm:generation_tokens_total", model_name="m") == 7
            assert told.value("infinite_llm_step_part_seconds_total", part="merge") == 0.5
            assert told.value("infinite_llm_build_info", version=version()) == 1
            assert told.value("process_resident_memory_bytes") > 1 << 20
            assert not [name for name in told.families if name.endswith("_created")]

            assert (await http.get("/")).status_code == 404
            assert (await http.post("/metrics")).status_code == 405
        await port.close()
        async with httpx.AsyncClient(base_url=f"http://{port.address}", timeout=5) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get("/metrics")

    asyncio.run(scenario())


def test_no_port_unless_asked_for() -> None:
    async def scenario() -> None:
        port = MetricsPort(None, make_registry(), allow_insecure=False)
        port.start()
        assert port.address == ""
        await port.close()

    asyncio.run(scenario())


def test_an_address_that_others_reach_must_be_wanted() -> None:
    with pytest.raises(ConfigError, match="metrics_listen: refusing"):
        MetricsPort("0.0.0.0:0", make_registry(), allow_insecure=False)
