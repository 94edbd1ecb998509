"""A step's batch as tensors: packed rows, their slots, the local plan and each daemon's share."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import AttentionPlan
from services.dataplane.device import Device
from services.dataplane.remote_attention import PeerShare
from services.dataplane.wire import PlanSegment, SegmentTrace
from services.instance.dist_attention import StepTensors
from services.instance.rotary import RotaryRegimes
from services.instance.scheduler import Scheduled
from services.rmanager.block_table import BlockTable


@dataclass(frozen=True, slots=True)
class Batch:
    """One step.

    Attributes:
        token_ids, positions: [rows] int64; rows of a sequence follow one another.
        step: the plan for the local pool.
        shares: what each daemon computes.
        logit_rows: [n] int64, ascending: rows that tell log-probabilities of a prompt, and the last row of each
            sequence that is sampled.
        long_rows: [rows] bool, rows of the long rotary regime; None where there are none.
    """

    token_ids: Tensor
    positions: Tensor
    step: StepTensors
    shares: tuple[PeerShare, ...]
    logit_rows: Tensor
    long_rows: Tensor | None


def build_batch(
    scheduled: SequenceOf[Scheduled], tables: SequenceOf[BlockTable], rotary: RotaryRegimes, reach: int
) -> Batch:
    """Makes the tensors of a step; ``tables`` belong to ``scheduled``, one each, with blocks for all rows.

    Remote segments' new blocks count as sent from here on: a batch that was built is a batch whose plan is sent, or the
    peer is lost. What no layer sees is no part of it: a plan without a query behind it would never be answered, and
    would take room in the daemon's window for good.

    Args:
        reach: how many tokens back any layer sees; 0: some layer sees everything.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    blocks: list[NDArray[np.int64]] = []
    starts = [0]
    logit_rows: list[int] = []
    for item, table in zip(scheduled, tables, strict=True):
        first, end = item.sequence.computed, item.sequence.computed + item.count
        tokens += item.sequence.tokens[first:end]
        positions += range(first, end)
        slots += _slots(table, first, end)
        blocks.append(table.local_blocks)
        logit_rows += (starts[-1] + position - first for position in item.scored)
        starts.append(starts[-1] + item.count)
        if item.samples:
            logit_rows.append(starts[-1] - 1)
    plan = _plan(starts, [item.sequence.computed for item in scheduled], blocks)
    return Batch(
        token_ids=torch.tensor(tokens, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        step=StepTensors(torch.tensor(slots, dtype=torch.int64), plan, _sampled(scheduled, blocks)),
        shares=_shares(scheduled, tables, starts, reach),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        long_rows=_long_rows(scheduled, rotary),
    )


def _plan(starts: SequenceOf[int], positions: SequenceOf[int], blocks: SequenceOf[NDArray[np.int64]]) -> AttentionPlan:
    """Args: as in ``AttentionPlan``, for each sequence; blocks: index and position of each block."""
    local = np.concatenate(blocks) if blocks else np.empty((0, 2), np.int64)
    return AttentionPlan(
        query_start=torch.tensor(starts, dtype=torch.int32),
        query_pos=torch.tensor(positions, dtype=torch.int32),
        block_start=torch.tensor([0, *accumulate(map(len, blocks))], dtype=torch.int32),
        block_ids=torch.from_numpy(local[:, 0].astype(np.int32)),
        block_pos=torch.from_numpy(local[:, 1].astype(np.int32)),
        max_query_len=max((end - start for start, end in pairwise(starts)), default=0),
    )


def _sampled(scheduled: SequenceOf[Scheduled], blocks: SequenceOf[NDArray[np.int64]]) -> AttentionPlan | None:
    """As in ``StepTensors``. A prompt whose log-probabilities are told wants more rows than its last one."""
    if all(item.samples and item.count == 1 for item in scheduled) or any(item.scored for item in scheduled):
        return None
    sampled = [(item, of_item) for item, of_item in zip(scheduled, blocks, strict=True) if item.samples]
    last = [item.sequence.computed + item.count - 1 for item, _ in sampled]
    return _plan(range(len(sampled) + 1), last, [of_item for _, of_item in sampled])


def upload_batch(batch: Batch, device: Device) -> Batch:
    """The batch with its tensors on the device, but for the daemons' shares."""
    step = batch.step
    plans = [step.local] if step.sampled is None else [step.local, step.sampled]
    tensors = [batch.token_ids, batch.positions, batch.logit_rows, step.slots]
    for plan in plans:
        tensors += [plan.query_start, plan.query_pos, plan.block_start, plan.block_ids, plan.block_pos]
    if batch.long_rows is not None:
        tensors.append(batch.long_rows)
    token_ids, positions, logit_rows, slots, *rest = device.upload(tensors)
    uploaded = [
        AttentionPlan(rest[at], rest[at + 1], rest[at + 2], rest[at + 3], rest[at + 4], plan.max_query_len)
        for at, plan in zip(range(0, 5 * len(plans), 5), plans, strict=True)
    ]
    return replace(
        batch,
        token_ids=token_ids,
        positions=positions,
        step=StepTensors(slots, *uploaded),
        logit_rows=logit_rows,
        long_rows=None if batch.long_rows is None else rest[-1],
    )


def _long_rows(scheduled: SequenceOf[Scheduled], rotary: RotaryRegimes) -> Tensor | None:
    long = [rotary.is_long(item.sequence.request) for item in scheduled]
    if not any(long):
        return None
    return torch.tensor(long).repeat_interleave(torch.tensor([item.count for item in scheduled]))


def _slots(table: BlockTable, first: int, end: int) -> Iterator[int]:
    """Places in the local pool of the tokens at positions first .. end, block by block."""
    while first < end:
        block_end = min(end, first - first % table.block_tokens + table.block_tokens)
        slot = table.slot(first)
        yield from range(slot, slot + block_end - first)
        first = block_end


def _shares(
    scheduled: SequenceOf[Scheduled], tables: SequenceOf[BlockTable], starts: list[int], reach: int
) -> tuple[PeerShare, ...]:
    rows: dict[str, list[NDArray[np.int64]]] = {}
    segments: dict[str, list[PlanSegment]] = {}
    distances: dict[str, int] = {}
    traces: dict[str, list[SegmentTrace]] = {}
    for at, (item, table) in enumerate(zip(scheduled, tables, strict=True)):
        for kvdaemon_id, segment in table.segments.items():
            newest_key = int(segment.blocks.rows[-1, 2]) + table.block_tokens - 1
            distance = item.sequence.computed - newest_key
            if 0 < reach <= distance:
                continue
            rows.setdefault(kvdaemon_id, []).append(np.arange(starts[at], starts[at + 1]))
            new = segment.blocks.rows[segment.sent :].astype(np.uint32)
            plan = PlanSegment(segment.handle, item.count, item.sequence.computed, segment.sent, new)
            segments.setdefault(kvdaemon_id, []).append(plan)
            if segment.sent == 0 and item.sequence.trace is not None:
                traces.setdefault(kvdaemon_id, []).append(SegmentTrace(segment.handle, item.sequence.trace))
            segment.sent = segment.blocks.count
            distances[kvdaemon_id] = min(distance, distances.get(kvdaemon_id, distance))
    return tuple(
        PeerShare(
            kvdaemon_id,
            torch.from_numpy(np.concatenate(rows[kvdaemon_id])),
            tuple(plans),
            distances[kvdaemon_id],
            tuple(traces.get(kvdaemon_id, ())),
        )
        for kvdaemon_id, plans in segments.items()
    )
