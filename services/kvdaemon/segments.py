"""What a daemon knows of one connection's segments, and a step's plan made of it.

A segment grows by what each PLAN adds, until it is forgotten or the connection ends; a PLAN may also drop its last
blocks, to put one before them. The plan of a step is built once, when it arrives, and serves the queries of all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import AttentionPlan
from services.core.errors import InvalidRequestError
from services.dataplane.wire import PlanSegment

_MAX_POSITION = (1 << 31) - 1  # positions are int32 in the kernels
_NONE = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class _Segment:
    """One sequence's sealed blocks in this pool: ``ids`` [n] and the position of their first token, ascending, [n]."""

    ids: NDArray[np.int32]
    positions: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step's plan; every QUERY of the step has ``rows`` rows."""

    step: int
    rows: int
    attention: AttentionPlan


class SegmentTable:
    """The segments of one connection, by the handle that its peer chose."""

    def __init__(self) -> None:
        self._segments: dict[int, _Segment] = {}

    def __len__(self) -> int:
        return len(self._segments)

    def plan(self, step: int, segments: Sequence[PlanSegment]) -> StepPlan:
        """Takes in the new blocks of a PLAN, which the caller has found readable, and builds the step's plan.

        Raises:
            InvalidRequestError: the peer believes something else to be known, or positions do not ascend.
        """
        parts = [self._extended(segment) for segment in segments]
        lengths = np.fromiter((segment.query_len for segment in segments), np.int64, len(segments))
        starts = np.fromiter((segment.query_pos for segment in segments), np.int64, len(segments))
        if max((starts + lengths).max(initial=0), lengths.sum()) > _MAX_POSITION:
            raise InvalidRequestError(f"PLAN of step {step}: query positions reach beyond {_MAX_POSITION}")
        attention = AttentionPlan(
            query_start=_offsets(lengths),
            query_pos=torch.from_numpy(starts.astype(np.int32)),
            block_start=_offsets([len(part.ids) for part in parts]),
            block_ids=torch.from_numpy(np.concatenate([_NONE, *(part.ids for part in parts)])),
            block_pos=torch.from_numpy(np.concatenate([_NONE, *(part.positions for part in parts)])),
            max_query_len=int(lengths.max(initial=0)),
        )
        return StepPlan(step, int(lengths.sum()), attention)

    def forget(self, handles: Iterable[int]) -> None:
        """Drops segments. One that no PLAN ever named, because its step was given up before, is no error."""
        for handle in handles:
            self._segments.pop(handle, None)

    def _extended(self, new: PlanSegment) -> _Segment:
        """The segment with the blocks that a PLAN adds after the first ``new.known``."""
        old = self._segments.get(new.handle)
        have = 0 if old is None else len(old.ids)
        known = new.known
        if known > have:
            raise InvalidRequestError(
                f"PLAN: the peer believes {known} blocks of segment {new.handle} to be known; {have} are"
            )
        if old is not None and known == have and not len(new.blocks):
            return old
        if len(new.blocks) and new.blocks[:, 2].max() > _MAX_POSITION:
            raise InvalidRequestError(f"PLAN: blocks of segment {new.handle} lie beyond position {_MAX_POSITION}")
        ids, positions = new.blocks[:, 0].astype(np.int32), new.blocks[:, 2].astype(np.int32)
        if old is not None:
            ids, positions = np.concatenate([old.ids[:known], ids]), np.concatenate([old.positions[:known], positions])
        # What was known ascends already: look at the last known block and the new ones.
        if (np.diff(positions[max(known - 1, 0) :]) <= 0).any():
            raise InvalidRequestError(f"PLAN: the positions of segment {new.handle} do not ascend")
        segment = _Segment(ids, positions)
        self._segments[new.handle] = segment
        return segment


def _offsets(lengths: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
    """[n + 1] int32: where each part begins, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return torch.from_numpy(offsets)
