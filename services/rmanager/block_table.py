"""Where one sequence's rBlocks lie.

Every block index of a sequence has one entry. A block begins *open* in the local pool, is filled there, and is then
either sealed in place or shipped to another daemon; a sealed block may go from place to place. Until a change is
acknowledged, the entry goes on naming the old block, which stays readable. Local entries and each daemon's segment are
kept as growing arrays beside the entries, so that a step's plan is made by slicing, not by walking the context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from services.core.blocks import BlockHandle, BlockRef


class Home(Enum):
    """Which stock of local blocks an entry's block belongs to."""

    WORKSPACE = "workspace"  # the instance's own, to be given back
    REQUEST = "request"  # reserved for this request in the local pool
    SEALED = "sealed"  # sealed in the local pool: one hold


@dataclass(slots=True)
class Entry:
    """One block of the sequence.

    Attributes:
        local: the block in the local pool; None once it lies elsewhere.
        home: what becomes of the local block when it is given up.
        remote: where it lies if not here.
        busy: a seal or a move is under way; whoever started it settles the block.
    """

    local: BlockHandle | None
    home: Home
    remote: BlockRef | None = None
    busy: bool = False


class _Rows:
    """Growing int array ``[n, columns]``, kept ascending by its last column (the position)."""

    def __init__(self, columns: int) -> None:
        self._data = np.zeros((16, columns), np.int64)
        self.count = 0

    @property
    def rows(self) -> NDArray[np.int64]:
        return self._data[: self.count]

    def insert(self, row: tuple[int, ...]) -> int:
        """Inserts by position; answers the index."""
        if self.count == len(self._data):
            self._data = np.concatenate([self._data, np.zeros_like(self._data)])
        positions = self._data[: self.count, -1]
        at = self.count
        if self.count and row[-1] < positions[-1]:
            at = int(np.searchsorted(positions, row[-1]))
            self._data[at + 1 : self.count + 1] = self._data[at : self.count]
        self._data[at] = row
        self.count += 1
        return at

    def remove(self, position: int) -> int:
        """Removes by position; answers the index."""
        at = int(np.searchsorted(self._data[: self.count, -1], position))
        assert at < self.count, "no such position"
        assert self._data[at, -1] == position
        self._data[at : self.count - 1] = self._data[at + 1 : self.count]
        self.count -= 1
        return at


@dataclass(slots=True)
class RemoteSegment:
    """A sequence's blocks on one daemon.

    Attributes:
        handle: names the segment on the data connection to that daemon.
        blocks: rows (block, generation, position) in the order in which they were added.
        sent: rows that the daemon knows already.
    """

    kvdaemon_id: str
    handle: int
    blocks: _Rows = field(default_factory=lambda: _Rows(3))
    sent: int = 0

    def add(self, handle: BlockHandle, position: int) -> None:
        at = self.blocks.insert((handle.block, handle.generation, position))
        self.sent = min(self.sent, at)  # a block before known ones: the daemon is told the list anew from there

    def remove(self, position: int) -> None:
        self.sent = min(self.sent, self.blocks.remove(position))  # likewise


class BlockTable:
    """The blocks of one sequence, by index; index i holds tokens i * block_tokens and up."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.entries: list[Entry] = []
        self.segments: dict[str, RemoteSegment] = {}
        self._local = _Rows(2)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def local_blocks(self) -> NDArray[np.int64]:
        """``[n, 2]``: block in the local pool and position of its first token, ascending by position."""
        return self._local.rows

    def append_local(self, handle: BlockHandle, home: Home) -> None:
        self._local.insert((handle.block, len(self.entries) * self.block_tokens))
        self.entries.append(Entry(handle, home))

    def append_remote(self, ref: BlockRef, segment_handle: int) -> None:
        """Adds a sealed block of another daemon; ``segment_handle`` is used if it is the first one there."""
        self.entries.append(Entry(None, Home.SEALED, ref))
        self._add_remote(len(self.entries) - 1, ref, segment_handle)

    def replace_local(self, index: int, handle: BlockHandle) -> None:
        """The same content lies in another block of the local pool now."""
        self._local.remove(index * self.block_tokens)
        self._local.insert((handle.block, index * self.block_tokens))
        self.entries[index].local = handle

    def move_to_remote(self, index: int, ref: BlockRef, segment_handle: int) -> RemoteSegment | None:
        """The same content lies on another daemon now. Answers the segment that has become empty, if one has."""
        emptied = self._leave(index)
        entry = self.entries[index]
        entry.local, entry.home, entry.remote = None, Home.SEALED, ref
        self._add_remote(index, ref, segment_handle)
        return emptied

    def move_to_local(self, index: int, handle: BlockHandle) -> RemoteSegment | None:
        """The content of a remote block lies sealed in the local pool now. Answers as ``move_to_remote``."""
        emptied = self._leave(index)
        entry = self.entries[index]
        entry.local, entry.home, entry.remote = handle, Home.SEALED, None
        self._local.insert((handle.block, index * self.block_tokens))
        return emptied

    def blocks_on(self, kvdaemon_id: str) -> int:
        segment = self.segments.get(kvdaemon_id)
        return segment.blocks.count if segment else 0

    def slot(self, position: int) -> int:
        """Index of a token's place in the local pool: block * block_tokens + offset."""
        entry = self.entries[position // self.block_tokens]
        assert entry.local is not None
        return entry.local.block * self.block_tokens + position % self.block_tokens

    def _leave(self, index: int) -> RemoteSegment | None:
        """Takes a block out of the arrays; a segment without blocks is no segment."""
        entry = self.entries[index]
        if entry.remote is None:
            self._local.remove(index * self.block_tokens)
            return None
        segment = self.segments[entry.remote.kvdaemon_id]
        segment.remove(index * self.block_tokens)
        if segment.blocks.count:
            return None
        return self.segments.pop(entry.remote.kvdaemon_id)

    def _add_remote(self, index: int, ref: BlockRef, segment_handle: int) -> None:
        segment = self.segments.get(ref.kvdaemon_id)
        if segment is None:
            segment = self.segments[ref.kvdaemon_id] = RemoteSegment(ref.kvdaemon_id, segment_handle)
        segment.add(ref.handle, index * self.block_tokens)
