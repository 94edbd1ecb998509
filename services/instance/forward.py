"""A step's computation: the daemons get their plans, then the model runs."""

from __future__ import annotations

from torch import Tensor

from services.dataplane.device import Device
from services.dataplane.remote_attention import RemoteAttention
from services.instance.batch import Batch, upload_batch
from services.instance.dist_attention import DistAttention
from services.instance.model import Model


class Forward:
    """Computes steps. Used by the engine thread."""

    def __init__(self, model: Model, attention: DistAttention, remote: RemoteAttention, device: Device) -> None:
        self._model = model
        self._attention = attention
        self._remote = remote
        self._device = device

    def run(self, step: int, batch: Batch) -> Tensor:
        """Computes one step; nothing of it is under way when this answers, or fails.

        Args:
            batch: in host memory.

        Returns:
            [logit_rows, vocab_size] in the model's dtype, on the device.

        Raises:
            PeerLostError, TransferTimeoutError: the step must be discarded.
        """
        batch = upload_batch(batch, self._device)
        try:
            self._remote.begin_step(step, batch.shares)
            self._attention.begin_step(batch.step)
            return self._model.forward(batch.token_ids, batch.positions, batch.logit_rows, batch.long_rows)
        finally:
            # Blocks that are sealed next can be read by others, and those of a discarded step be given to others.
            self._device.settle()
