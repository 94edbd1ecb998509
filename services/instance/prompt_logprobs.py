"""Log-probabilities of prompts' tokens: the row of a prompt's token tells that of the token behind it.

A step answers logits of all rows that tell something (``Scheduled.scored``) and of those that are sampled, in the
batch's order; the scheduler sees to it that they are not too many.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from services.instance.logprobs import logprobs_of
from services.instance.outputs import PromptOutput
from services.instance.scheduler import Scheduled


def sampled_logits(logits: Tensor, scheduled: SequenceOf[Scheduled]) -> Tensor:
    """Of a step's logits, [n, vocab_size], those that are sampled from."""
    rows: list[int] = []
    at = 0
    for item in scheduled:
        at += len(item.scored)
        if item.samples:
            rows.append(at)
            at += 1
    return logits if len(rows) == at else logits[torch.tensor(rows, dtype=torch.int64, device=logits.device)]


def prompt_outputs(logits: Tensor, scheduled: SequenceOf[Scheduled]) -> Iterator[PromptOutput]:
    """What a step's logits, [n, vocab_size], tell of prompts; their sequences take note of it.

    Comes before the step is committed: which rows these are follows from what was computed before.
    """
    at = 0
    for item in scheduled:
        sequence, count = item.sequence, len(item.scored)
        if count:
            request, first = sequence.request, item.scored.start + 1
            told = logprobs_of(
                logits[at : at + count], sequence.tokens[first : first + count], request.sampling.prompt_logprobs
            )
            yield PromptOutput(request.request_id, request.stream_id, first, tuple(told))
            sequence.scored = first + count
        at += count + item.samples
