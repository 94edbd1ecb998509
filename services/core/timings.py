"""What steps took, as instances and daemons measure it: what the gManager's cost model is fed with. Pure.

Timings are told as means over the steps that were alike since the last report; so a message stays small, however many
steps there were, and noise averages out. Counts are therefore not whole numbers.
"""

from __future__ import annotations

from typing import NamedTuple


class RemoteTiming(NamedTuple):
    """One daemon's part in a step, seen by the debtor.

    Attributes:
        messages: queries answered (layers, less those whose window ends before).
        rows: requests of the batch with blocks there.
        context_tokens: of those requests, there.
        answer_s: from sending a layer's query until its answer was taken, summed over layers.
        late: share of the answers that were waited for. The others had come while local attention was computed, nobody
            knows when: for them ``answer_s`` is an upper bound.
    """

    kvdaemon_id: str
    messages: float
    rows: float
    context_tokens: float
    answer_s: float
    late: float = 1.0


class StepTiming(NamedTuple):
    """The mean of several steps alike: all with the same daemons, and all with prefill rows or all without.

    Attributes:
        batch_tokens: all tokens computed.
        prefill_tokens: those of prefill chunks among them.
        local_context_tokens: in the own pool, of all requests in the batch.
        step_s: from the step's beginning until its tokens were there.
        attention_s: of it, from sending queries until the last answer was merged, summed over layers.
        local_attention_s: of that, the own pool's kernel.
        steps: how many; all else is for one of them.
    """

    batch_tokens: float
    prefill_tokens: float
    local_context_tokens: float
    step_s: float
    attention_s: float
    local_attention_s: float
    remotes: tuple[RemoteTiming, ...] = ()
    steps: int = 1


class HostingTiming(NamedTuple):
    """What a daemon computed for others since its last report: queries without prefill rows, and their time.

    Attributes:
        messages: one for each layer and debtor's step.
        context_tokens: those queries' contexts there, summed, divided by the number of layers.
        compute_s: in the kernel.
    """

    messages: float
    context_tokens: float
    compute_s: float
