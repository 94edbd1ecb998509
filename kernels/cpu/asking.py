"""Queries that compiled code sends and whose answers it merges: ``asking`` of ``src/abi.h``.

The instance's counterpart of ``answering``: from a layer's query rows to the merged partial state, no Python runs but
what hands over addresses.
"""

from __future__ import annotations

from ctypes import addressof, byref
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cpu.answering import ENDINGS, Watched
from kernels.cpu.library import DTYPES, Asking, AskingSums, Channel, load_library
from kernels.interface import LayerParams


class Exchanged(NamedTuple):
    """What several layers have asked, one after the other.

    ``lates``: answers that were waited for; ``answers_s``: from sending each query until its answer was taken;
    ``waits_s``: waiting for them; ``answered``: the sequence number of the last answer, 0 if there is none.
    """

    asks: int
    answers: int
    lates: int
    sent_bytes: int
    received_bytes: int
    answers_s: float
    merges_s: float
    waits_s: float
    answered: int


class CompiledAsker:
    """One daemon's part of a step, to be asked layer by layer, once a transport has set the channel.

    Args:
        context: of the kernels, which must be kept.
        rows: [n] int64, contiguous: the batch's rows that the daemon is asked about; None: all of them.
        batch_rows: of the step.
        out_dtype: of the partial outputs.
        kept: whatever must live as long as ``context`` is used.
    """

    def __init__(
        self, context: int, rows: Tensor | None, batch_rows: int, step: int, out_dtype: torch.dtype, kept: object
    ) -> None:
        self._kept = kept, rows
        self._asking = Asking(
            kernels=context,
            rows=None if rows is None else rows.data_ptr(),
            count=batch_rows if rows is None else len(rows),
            batch_rows=batch_rows,
            step=step,
            out_dtype=DTYPES[out_dtype],
        )
        self.channel: Channel = self._asking.channel
        self._by_reference = byref(self._asking)
        self._q_layout: object = None
        library = load_library()
        self._ask, self._take_answer = library.ask, library.take_answer

    def set_query(self, q: Tensor, params: LayerParams) -> None:
        """What a layer asks.

        Args:
            q: [rows of the batch, q_heads, head_dim], contiguous in the last two dimensions.
        """
        asking = self._asking
        self.set_layout(q)
        asking.q, asking.layer, asking.window = q.data_ptr(), params.layer, params.window
        asking.scale, asking.softcap = params.scale, params.softcap

    def set_layout(self, q: Tensor) -> None:
        """The shape of all layers' queries, as in ``set_query``."""
        layout = (q.shape, q.stride(), q.dtype)
        if layout != self._q_layout:
            self._set_layout(q)
            self._q_layout = layout

    def set_target(self, out: Tensor, lse: Tensor) -> None:
        """What the layer's answer is merged into.

        Args:
            out: [rows of the batch, q_heads, head_dim] float32, contiguous.
            lse: [rows of the batch, q_heads] float32, contiguous.
        """
        self._asking.out, self._asking.lse = out.data_ptr(), lse.data_ptr()

    def ask(self, sequence: int) -> int:
        """Sends the query as message number ``sequence`` and answers its bytes; 0: it does not fit."""
        self._asking.sequence = sequence
        return self._asking.query_bytes if self._ask(self._by_reference) else 0

    def take_answer(self, spin_s: float) -> Watched:
        """Merges the answer, for which it waits up to ``spin_s`` seconds without sleep.

        Returns:
            TAKEN, or why it has not been; CHANGED: something else has come before it.
        """
        self._asking.spin_ns = int(1e9 * spin_s)
        ending: int = self._take_answer(self._by_reference)
        return ENDINGS[ending]

    # ------------------------------------------------------------ layers that ask one after the other (a stack)

    @property
    def address(self) -> int:
        return addressof(self._asking)

    def begin(self, sequence: int, distance: int) -> None:
        """Layers may ask.

        Args:
            sequence: number of the last message.
            distance: from any row back to the nearest key of its sequence there: a layer whose window is not longer
                does not ask.
        """
        self._asking.sequence, self._asking.distance = sequence, distance
        self._asking.sums, self._asking.ending = AskingSums(), Watched.TAKEN

    def wait_for(self, spin_s: float) -> None:
        """How long each of their answers is waited for without sleep."""
        self._asking.spin_ns = int(1e9 * spin_s)

    @property
    def sequence(self) -> int:
        """Of the last query."""
        number: int = self._asking.sequence
        return number

    @property
    def query_bytes(self) -> int:
        """Of the last query."""
        count: int = self._asking.query_bytes
        return count

    @property
    def sent_at_s(self) -> float:
        """When it was sent, on the clock of ``time.perf_counter``."""
        return 1e-9 * float(self._asking.sent_at_ns)

    @property
    def exchanged(self) -> Exchanged:
        """Since ``begin``."""
        sums = self._asking.sums
        return Exchanged(
            sums.asks,
            sums.answers,
            sums.lates,
            sums.sent_bytes,
            sums.received_bytes,
            1e-9 * sums.answers_ns,
            1e-9 * sums.merges_ns,
            1e-9 * sums.waits_ns,
            sums.answered,
        )

    @property
    def ending(self) -> Watched:
        """How the last wait has ended."""
        ending: int = self._asking.ending
        return ENDINGS[ending]

    # ------------------------------------------------------------ the answer taken last

    @property
    def answer_bytes(self) -> int:
        """Of the answer taken last."""
        count: int = self._asking.answer_bytes
        return count

    @property
    def taken_at_s(self) -> float:
        """When it was taken, on the clock of ``time.perf_counter``."""
        return 1e-9 * float(self._asking.taken_at_ns)

    @property
    def merge_s(self) -> float:
        """What merging it took."""
        return 1e-9 * float(self._asking.merged_ns)

    @property
    def late(self) -> bool:
        """Whether it had not come yet when it was looked for."""
        return bool(self._asking.late)

    def _set_layout(self, q: Tensor) -> None:
        rows, heads, dim = q.shape
        if rows != self._asking.batch_rows or q.stride(2) != 1 or (heads > 1 and q.stride(1) != dim):
            raise ValueError(
                f"q must be [{self._asking.batch_rows}, q_heads, head_dim], contiguous in the last two dimensions, "
                f"got {list(q.shape)} with strides {q.stride()}"
            )
        self._asking.q_heads, self._asking.head_dim, self._asking.dtype = heads, dim, DTYPES[q.dtype]
        self._asking.q_stride_bytes = q.stride(0) * q.element_size()
