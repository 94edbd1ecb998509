"""A step's computation: the daemons get their plans, then the model runs."""

from __future__ import annotations

from torch import Tensor

from services.dataplane.remote_attention import RemoteAttention
from services.instance.batch import Batch
from services.instance.dist_attention import DistAttention
from services.instance.model import Model


class Forward:
    """Computes steps. Used by the engine thread."""

    def __init__(self, model: Model, attention: DistAttention, remote: RemoteAttention) -> None:
        self._model = model
        self._attention = attention
        self._remote = remote

    def run(self, step: int, batch: Batch) -> Tensor:
        """
        Returns:
            [logit_rows, vocab_size] in the model's dtype.

        Raises:
            PeerLostError, TransferTimeoutError: the step must be discarded.
        """
        self._remote.begin_step(step, batch.shares)
        self._attention.begin_step(batch.step)
        return self._model.forward(batch.token_ids, batch.positions, batch.logit_rows, batch.long_rows)
