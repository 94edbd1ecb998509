"""What the comparison with vLLM makes of its samples, and how it refuses what it cannot measure."""

from __future__ import annotations

import argparse
import io
import os
from dataclasses import dataclass

import pytest

from benchmarks.checkpoints import SHAPES
from benchmarks.engine_vs_vllm import (
    QUICK_WORKLOADS,
    WORKLOADS,
    Measured,
    _add_arguments,
    _chosen,
    _judge,
    _pinned_to,
    _record,
)
from benchmarks.harness import Progress, Run
from services.core.errors import ConfigError

SHAPE = SHAPES["llama-100m"]
BY_NAME = {workload.name: workload for workload in WORKLOADS}


@dataclass
class Named:
    """As much of a server as the table needs."""

    name: str


def run_of(*arguments: str) -> Run:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    _add_arguments(parser)
    return Run("engine_vs_vllm", parser.parse_args(arguments), Progress(io.StringIO()))


def test_ratios_are_of_medians_and_their_range_is_of_rounds() -> None:
    ours = Measured(Named("ours"), [100.0, 300.0, 120.0], [9.0, 10.0, 11.0], [3.0, 1.0, 2.0])
    vllm = Measured(Named("vllm"), [200.0, 100.0, 240.0], [5.0, 4.0, 6.0], [6.0, 5.0, 7.0])
    run = run_of()
    assert _record(run, SHAPE, BY_NAME["decode-8"], ours, vllm) == 0.6
    result = run.result()
    assert result["rows"] == [
        {
            "checkpoint": "llama-100m",
            "workload": "decode-8",
            "ours_tokens_per_s": 120.0,
            "ours_spread": 200.0,
            "vllm_tokens_per_s": 200.0,
            "vllm_spread": 140.0,
            "ratio": 0.6,
            "ratio_min": 0.5,
            "ratio_max": 3.0,
            "ours_processor_us_per_token": 10.0,
            "vllm_processor_us_per_token": 5.0,
            "processor_ratio": 0.5,
            "ours_tpot_ms": 2.0,
            "vllm_tpot_ms": 6.0,
            "repetitions": 3,
        }
    ]
    assert result["summary"] == {"llama-100m_decode-8_ratio": 0.6}


def test_every_row_and_the_median_have_a_goal() -> None:
    run = run_of()
    _judge(run, [1.7, 0.9, 1.3, 1.2])
    judged = {name: (target["value"], target["ok"]) for name, target in run.result()["targets"].items()}
    assert judged == {"slowest_ratio": (0.9, False), "median_ratio": (1.25, False)}


def test_prefill_has_no_time_between_tokens() -> None:
    ours, vllm = (Measured(Named(name), [1.0], [1.0], [0.0]) for name in ("ours", "vllm"))
    run = run_of()
    _record(run, SHAPE, BY_NAME["prefill-4096"], ours, vllm)
    (row,) = run.result()["rows"]
    assert not [column for column in row if "tpot" in column]


def test_what_counts_as_a_token() -> None:
    assert BY_NAME["decode-64"].tokens == 64 * 128
    assert BY_NAME["prefill-512"].tokens == 4 * 512


def test_workloads_are_chosen_by_name() -> None:
    assert list(_chosen(run_of())) == list(WORKLOADS)
    assert list(_chosen(run_of("--quick"))) == list(QUICK_WORKLOADS)
    assert [workload.name for workload in _chosen(run_of("--workloads", "prefill-512"))] == ["prefill-512"]
    with pytest.raises(ConfigError, match="decode-7"):
        _chosen(run_of("--workloads", "decode-7"))


def test_the_client_goes_back_to_all_its_cores() -> None:
    before = os.sched_getaffinity(0)
    with _pinned_to(min(before)):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before
