"""Requests whose prompts lie in the pools already: the model, the cluster and the timing of one answer.

What ``distance`` and ``growth`` have in common. The instance and its own daemon run on one core, a daemon that lends
memory on another: a machine each.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
import urllib.request
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.checkpoints import SHAPES, CheckpointShape, random_prompt, write_random_checkpoint
from benchmarks.long_request import VoidMeasurementError
from benchmarks.peers.processes import family
from infinitellm import AsyncClient, Finished, Tokens
from services.core.blocks import DTYPE_BYTES, BlockKeySpace, PoolGeometry
from services.dataplane.select import Scheme
from services.instance.model import load_model
from services.launcher.options import ClusterOptions

BLOCK_TOKENS = 64
GROUP = 4  # query heads for each KV head
NEAR, FAR = "kvdaemon-0", "kvdaemon-mem-0"
TIMEOUT_S = 600.0
TAIL = 64  # tokens of a prompt behind what is filled: one block of prefill
STEPS = 32
_WARM_STEPS = 4  # at the beginning of an answer, not counted
ROWS = TAIL + _WARM_STEPS + STEPS - 1  # of an answer that ask for attention: the last token's is never computed
_BATCH_TOKENS = 512
_WIRE_METRICS = ("infinite_llm_dataplane_sent_bytes_total", "infinite_llm_dataplane_received_bytes_total")
_DTYPE = "bfloat16"
_LARGE = SHAPES["llama-100m"]
SHAPE = CheckpointShape(  # 9 KiB of KV a token
    "llama-100m-long",
    _LARGE.config,
    {**_LARGE.settings, "num_key_value_heads": 3, "max_position_embeddings": 1 << 21},
)


@dataclass(frozen=True, slots=True)
class FilledModel:
    """The checkpoint, and what names and shapes its blocks."""

    path: Path
    geometry: PoolGeometry
    keys: BlockKeySpace


@dataclass(frozen=True, slots=True)
class FilledAnswer:
    """One answer.

    Attributes:
        ttft_s: until the first token: finding the prompt's blocks, and one block of prefill behind them.
        step_ms: the median time from one token to the next.
    """

    ttft_s: float
    step_ms: float


def write_model(directory: Path) -> FilledModel:
    """Writes the checkpoint into a new directory below this one."""
    path = directory / SHAPE.name
    write_random_checkpoint(path, SHAPE)
    shape = load_model(path, _DTYPE, None).shape
    geometry = shape.geometry(BLOCK_TOKENS, _DTYPE)
    return FilledModel(path, geometry, BlockKeySpace(shape.fingerprint, _DTYPE, (0, geometry.kv_heads)))


def cluster_options(
    model: FilledModel,
    filled_blocks: int,
    kvdaemons: int,
    link: str | None,
    transport: Scheme = "shm",
    *,
    planner: bool = False,
) -> ClusterOptions:
    """One instance; every pool has room for so many filled blocks, the workspace, and some answers.

    Args:
        planner: moves blocks while requests run; without it they stay where they were put.
    """
    workspace = 2 + 2 * (_BATCH_TOKENS // BLOCK_TOKENS + 1)
    answers = 32 * model.geometry.blocks_for(TAIL + _WARM_STEPS + STEPS)
    return ClusterOptions(
        model=model.path,
        instances=1,
        kvdaemons=kvdaemons,
        pool_mib=-(-(filled_blocks + workspace + answers) * model.geometry.block_bytes // (1 << 20)),
        dtype=_DTYPE,
        http_port=0,
        grpc_port=0,
        link=link,
        transport=transport,
        overlay={
            "instance": {
                "num_threads": 1,
                "max_num_seqs": 2,
                "max_batch_tokens": _BATCH_TOKENS,
                "block_tokens": BLOCK_TOKENS,
            },
            "kvdaemon": {"num_threads": 1},
            "gmanager": {"planner": planner},
        },
    )


def pin(near: int, far: int) -> None:
    """The instance and its daemon run on one core from now on, the other daemon on another."""
    cores = {NEAR: near, "instance-0": near, FAR: far}
    for process in family(os.getpid()):
        member = Path(process.command[-1]).stem if process.command else ""
        if member in cores:
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), {cores[member]})


def wire_bytes(http_address: str) -> float:
    """Bytes that the cluster's instance has exchanged with the far daemon so far, both ways, by its own metrics."""
    targets = json.loads(_get(f"http://{http_address}/metrics/targets"))
    (instance,) = (target["targets"][0] for target in targets if target["labels"]["service"] == "instance")
    return sum(
        sample.value
        for family in text_string_to_metric_families(_get(f"http://{instance}/metrics"))
        for sample in family.samples
        if sample.name in _WIRE_METRICS and FAR in sample.labels.values()
    )


def least_wire_bytes(model: FilledModel) -> int:
    """What a row must exchange with a daemon: queries there, partial outputs and their log-sum-exp back."""
    geometry = model.geometry
    heads = geometry.kv_heads * GROUP
    return geometry.layers * heads * (2 * geometry.head_dim * DTYPE_BYTES[geometry.dtype] + 4)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
        body: bytes = response.read()
    return body.decode()


async def time_answer(
    client: AsyncClient, filled: Sequence[int], draw: random.Random, shape: CheckpointShape = SHAPE
) -> FilledAnswer:
    """One request behind a filled prefix, to a model of that shape.

    Raises:
        VoidMeasurementError: the prefix was not found, or not all of it.
    """
    prompt = (*filled, *random_prompt(shape, TAIL, draw))
    times: list[float] = []
    cached = 0
    started = time.perf_counter()
    events = client.generate(prompt, max_tokens=_WARM_STEPS + STEPS, ignore_eos=True, timeout_s=TIMEOUT_S)
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Tokens):
                times += [time.perf_counter()] * len(event.ids)
            elif isinstance(event, Finished):
                cached = event.cached_tokens
    if cached != len(filled):
        raise VoidMeasurementError(f"{cached} tokens of a prompt were found in the pools, {len(filled)} are there")
    counted = times[_WARM_STEPS:]
    step_s = statistics.median(after - before for before, after in pairwise(counted))
    return FilledAnswer(times[0] - started, 1000 * step_s)
