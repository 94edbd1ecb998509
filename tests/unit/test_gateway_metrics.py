"""What a gateway counts of each request, whatever becomes of it."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry
from scraped import Scraped, scraped

from services.core.errors import ContextTooLongError
from services.gateway.request_metrics import MeasuredRequest, RequestMetrics


def outcomes(told: Scraped) -> dict[str, float]:
    return {name: count for name, count in told.by("outcome", "infinite_llm_requests_total").items() if count}


def test_an_answered_request() -> None:
    registry = CollectorRegistry()
    request = MeasuredRequest(RequestMetrics(registry))
    request.admitted(100)
    for count in (1, 1, 2):
        request.tokens(count)
    request.answered(cached_tokens=64)
    request.ended("length")
    told = scraped(registry)
    assert outcomes(told) == {"length": 1}
    assert told.value("infinite_llm_prompt_tokens_total") == 100
    assert told.value("infinite_llm_cached_prompt_tokens_total") == 64
    assert told.value("infinite_llm_generation_tokens_total") == 4
    assert told.value("infinite_llm_time_to_first_token_seconds_count") == 1
    assert told.value("infinite_llm_inter_token_latency_seconds_count") == 2
    assert told.value("infinite_llm_request_duration_seconds_count") == 1
    parts = ("time_to_first_token", "inter_token_latency")
    together = sum(told.value(f"infinite_llm_{part}_seconds_sum") for part in parts)
    assert 0 < together <= told.value("infinite_llm_request_duration_seconds_sum")


def test_refused_failed_and_aborted_requests() -> None:
    registry = CollectorRegistry()
    of_all = RequestMetrics(registry)
    with pytest.raises(ContextTooLongError), MeasuredRequest(of_all).refusals():
        raise ContextTooLongError("too long")
    with MeasuredRequest(of_all).refusals():
        pass
    failed = MeasuredRequest(of_all)
    failed.admitted(5)
    failed.tokens(1)
    failed.lost_instance()
    failed.ended("UNAVAILABLE")
    MeasuredRequest(of_all).ended("aborted")
    told = scraped(registry)
    assert outcomes(told) == {"refused": 2, "aborted": 1}
    assert told.by("reason", "infinite_llm_refusals_total") == {"CONTEXT_TOO_LONG": 1, "UNAVAILABLE": 1}
    assert told.value("infinite_llm_failovers_total") == 1
    assert told.value("infinite_llm_request_duration_seconds_count") == 0
