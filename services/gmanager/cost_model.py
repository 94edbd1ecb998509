"""What a step costs, and how its coefficients are learned from the steps that were made. Pure: no clock, no I/O.

**Model.** An instance's step over ``n`` batch tokens (one for each decoding request, more for a prefill chunk), with
``L`` context tokens in its own pool and shares of the context on other daemons ``c``:

    step      = other(n) + max(local(L), answer_c(...) for every c)
    other(n)  = step_s + token_s n + compute_token_s max(0, n - knee_tokens)
    local(L)  = attention_s + context_token_s L
    answer_c  = messages (message_s + row_s rows + query_s) + context_token_s H_c

``messages`` is the number of layers (one message for each layer and daemon), ``rows`` how many of the batch's requests
have blocks there, ``H_c`` all tokens that ``c`` hosts for anybody: at worst, every query finds the others' before it.
``query_s`` and ``context_token_s`` are computing, ``message_s`` and ``row_s`` are the way there and back. What a
daemon computes for others its own instance cannot compute: if debtors ``i`` make ``1 / pace_i`` steps a second, then

    hosting_c = sum_i (messages_i query_s + context_token_s S_ic) / pace_i         of the device's time,
    the step of c's instance = own step / (1 - hosting_c)

Sources: the sum of non-attention work at a rate that depends on the batch, ``W(n) / f(n)``, and of attention in
proportion to the context, ``S / g``, is the performance model of Infinite-LLM (arXiv 2401.02669), as is the creditor
that pays for what it hosts. ``W / f`` as two straight lines is the roofline model (Williams, Waterman and Patterson
2009): below the knee reading the weights takes longest, above it arithmetic. Maximum instead of sum: local and remote
attention run at the same time, and a layer goes on when both are there.

**Identifiability.** From whole steps alone nothing could be told apart: attention hides in the maximum, and the
coefficients of columns that only vary together share one number. So a step is observed in parts, each with its own
columns, and every coefficient is moved by something that varies by itself:

| observed, in seconds | columns | what separates them |
| --- | --- | --- |
| step without attention | 1, n, max(0, n - knee) | batch sizes; decode lies below the knee, prefill chunks above |
| local attention, if no row is prefill | 1, L | contexts grow with every step, requests come and go |
| query to answer, summed over layers | messages, messages rows, messages, S | rows; the next line |
| the daemon's own computing | 0, 0, messages, S | without it nothing tells computing from the way |

The last two are one fit for each daemon, fed by all its debtors and by itself. An answer that came while local
attention was still computed is known to have taken no longer than that; whoever feeds the model leaves it out, unless
that is news (``learning``).

The fits estimate factors on the calibration made at start, see ``robust_fit``. Coefficients that nothing has told apart
yet move together, the one with the larger part in what was observed the most. ``knee_tokens`` is not linear and is not
fitted; it is a property of device and model, found by the calibration. If it is wrong, the prediction error says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from services.core.timings import HostingTiming, StepTiming
from services.gmanager.robust_fit import RobustFit, RunningMedian, least_squares

_LEAST_SHARE = 0.01  # of a calibrated time: what a coefficient that did not show in it may explain; it is not 0
_KNEES = 33  # that are tried


@dataclass(frozen=True, slots=True)
class InstanceCosts:
    """Coefficients of one instance, in seconds per step over all layers; ``knee_tokens`` is in tokens."""

    step_s: float
    token_s: float
    knee_tokens: float
    compute_token_s: float
    attention_s: float
    context_token_s: float

    def other_s(self, batch_tokens: float) -> float:
        """All of a step that is not attention."""
        beyond = batch_tokens - self.knee_tokens
        return self.step_s + self.token_s * batch_tokens + (self.compute_token_s * beyond if beyond > 0 else 0.0)

    def local_s(self, context_tokens: float) -> float:
        """Attention over ``context_tokens`` of the own pool."""
        return self.attention_s + self.context_token_s * context_tokens if context_tokens > 0 else 0.0

    @classmethod
    def roofline(
        cls,
        weight_bytes: float,
        flops_per_token: float,
        kv_bytes_per_token: float,
        bytes_per_s: float,
        flops_per_s: float,
        overhead_s: float,
    ) -> Self:
        """What a device's rates promise, for a simulator and for processes that have not calibrated.

        Args:
            flops_per_token: of the non-attention layers, about two for each parameter.
            kv_bytes_per_token: of all layers.
            bytes_per_s, flops_per_s: rates that are reached, not those of the data sheet.
            overhead_s: of a step, whatever its batch; half of it counts as attention's.
        """
        weights_s, arithmetic_s = weight_bytes / bytes_per_s, flops_per_token / flops_per_s
        return cls(
            step_s=weights_s + overhead_s / 2,
            token_s=_LEAST_SHARE * arithmetic_s,
            knee_tokens=weights_s / arithmetic_s,
            compute_token_s=arithmetic_s,
            attention_s=overhead_s / 2,
            context_token_s=kv_bytes_per_token / bytes_per_s,
        )

    @classmethod
    def calibrated(cls, other: Sequence[tuple[int, float]], attention: Sequence[tuple[int, float]]) -> Self:
        """From a short calibration at start.

        Args:
            other: (batch tokens, seconds of a step without attention); at least four different batches, from 1 to the
                largest chunk, in powers of two, say.
            attention: (context tokens, seconds of attention in a step); at least two different contexts.
        Raises: ValueError with fewer, or with seconds that are not positive.
        """
        sizes = sorted({size for size, _ in other})
        if len(sizes) < 4 or len({tokens for tokens, _ in attention}) < 2:
            raise ValueError("a calibration needs at least four batch sizes and two contexts")
        if min(seconds for _, seconds in (*other, *attention)) <= 0:
            raise ValueError("a calibration needs positive times")
        knee, (step_s, token_s, compute_token_s) = _best_knee(other, sizes[1], sizes[-2])
        (attention_s, context_token_s), _ = least_squares([((1.0, tokens), s) for tokens, s in attention], 2)
        least_s, most_s = (_LEAST_SHARE * bound(s for _, s in other) for bound in (min, max))
        shortest_s, longest_s = (_LEAST_SHARE * bound(s for _, s in attention) for bound in (min, max))
        return cls(
            max(step_s, least_s),
            max(token_s, least_s / knee),
            knee,
            max(compute_token_s, most_s / sizes[-1]),
            max(attention_s, shortest_s),
            max(context_token_s, longest_s / max(tokens for tokens, _ in attention)),
        )


def _best_knee(other: Sequence[tuple[int, float]], least: int, most: int) -> tuple[float, list[float]]:
    fits = []
    for k in range(_KNEES):
        knee = least * (most / least) ** (k / (_KNEES - 1))
        rows = [((1.0, size, max(0.0, size - knee)), seconds) for size, seconds in other]
        coefficients, misfit = least_squares(rows, 3)
        fits.append((misfit, knee, coefficients))
    _, knee_tokens, best = min(fits)
    return knee_tokens, best


@dataclass(frozen=True, slots=True)
class DaemonCosts:
    """Coefficients of attention on one daemon, in seconds; ``context_token_s`` is over all layers."""

    message_s: float
    row_s: float
    query_s: float
    context_token_s: float

    def compute_s(self, messages: float, context_tokens: float) -> float:
        """The daemon's own time for one step of one debtor."""
        return messages * self.query_s + self.context_token_s * context_tokens

    def answer_s(self, messages: float, rows: float, context_tokens: float) -> float:
        """From query to answer, summed over the layers of a step."""
        way_s = messages * (self.message_s + self.row_s * rows)
        return way_s + self.compute_s(messages, context_tokens)


class CostModel:
    """The coefficients of all processes of one cluster, as far as is known. Used from one thread.

    Args:
        instance, kvdaemon: where a process has told of no calibration; all values > 0.
    """

    def __init__(self, instance: InstanceCosts, kvdaemon: DaemonCosts) -> None:
        self._default_instance = instance
        self._default_kvdaemon = kvdaemon
        self._instances: dict[str, _InstanceFit] = {}
        self._kvdaemons: dict[str, RobustFit] = {}

    def calibrate_instance(self, instance_id: str, calibration: InstanceCosts) -> None:
        """The process has started and measured itself: what was learned of its predecessor is forgotten."""
        self._instances[instance_id] = _InstanceFit(calibration)

    def calibrate_kvdaemon(self, kvdaemon_id: str, calibration: DaemonCosts) -> None:
        """The process has started and measured itself: what was learned of its predecessor is forgotten."""
        self._kvdaemons[kvdaemon_id] = _daemon_fit(calibration)

    def forget(self, instances: Sequence[str] = (), kvdaemons: Sequence[str] = ()) -> None:
        """Processes that have left the cluster."""
        for instance_id in instances:
            self._instances.pop(instance_id, None)
        for kvdaemon_id in kvdaemons:
            self._kvdaemons.pop(kvdaemon_id, None)

    def observe_step(self, instance_id: str, timing: StepTiming) -> None:
        """Takes in one step of an instance, and the answers of the daemons that took part in it."""
        fit = self._instances.get(instance_id)
        if fit is None:
            fit = self._instances[instance_id] = _InstanceFit(self._default_instance)
        decode = timing.prefill_tokens == 0
        if decode and timing.step_s > 0:
            attention_s = fit.costs.local_s(timing.local_context_tokens)
            for part in timing.remotes:
                costs = self.kvdaemon(part.kvdaemon_id)
                attention_s = max(attention_s, costs.answer_s(part.messages, part.rows, part.context_tokens))
            predicted = fit.costs.other_s(timing.batch_tokens) + attention_s
            fit.step_error.add(abs(predicted / timing.step_s - 1.0))
        fit.observe(timing)
        for remote in timing.remotes if decode else ():
            x = (remote.messages, remote.messages * remote.rows, remote.messages, remote.context_tokens)
            self._kvdaemon_fit(remote.kvdaemon_id).update(x, remote.answer_s)

    def observe_hosting(self, kvdaemon_id: str, timing: HostingTiming) -> None:
        """Takes in what a daemon says of its own computing."""
        if timing.messages:
            x = (0.0, 0.0, timing.messages, timing.context_tokens)
            self._kvdaemon_fit(kvdaemon_id).update(x, timing.compute_s)

    def instance(self, instance_id: str) -> InstanceCosts:
        """As known now; the calibration or the default where nothing was observed."""
        fit = self._instances.get(instance_id)
        return fit.costs if fit is not None else self._default_instance

    def kvdaemon(self, kvdaemon_id: str) -> DaemonCosts:
        """As known now; the calibration or the default where nothing was observed."""
        fit = self._kvdaemons.get(kvdaemon_id)
        return DaemonCosts(*fit.coefficients) if fit is not None else self._default_kvdaemon

    def step_error(self, instance_id: str) -> float | None:
        """Running median of ``|predicted / measured - 1|`` over the instance's decode steps, each predicted before it
        was learned from; None before the first."""
        fit = self._instances.get(instance_id)
        return fit.step_error.value if fit is not None else None

    def answer_error(self, kvdaemon_id: str) -> float | None:
        """The same for the answers and the computing of a daemon."""
        fit = self._kvdaemons.get(kvdaemon_id)
        return fit.error if fit is not None else None

    def _kvdaemon_fit(self, kvdaemon_id: str) -> RobustFit:
        fit = self._kvdaemons.get(kvdaemon_id)
        if fit is None:
            fit = self._kvdaemons[kvdaemon_id] = _daemon_fit(self._default_kvdaemon)
        return fit


class _InstanceFit:
    """Both fits of one instance."""

    def __init__(self, prior: InstanceCosts) -> None:
        self.costs = prior
        self.step_error = RunningMedian()
        self._other = RobustFit((prior.step_s, prior.token_s, prior.compute_token_s))
        self._local = RobustFit((prior.attention_s, prior.context_token_s))

    def observe(self, timing: StepTiming) -> None:
        knee = self.costs.knee_tokens
        beyond = max(0.0, timing.batch_tokens - knee)
        self._other.update((1.0, timing.batch_tokens, beyond), timing.step_s - timing.attention_s)
        if timing.prefill_tokens == 0 and timing.local_context_tokens > 0:
            self._local.update((1.0, timing.local_context_tokens), timing.local_attention_s)
        step_s, token_s, compute_token_s = self._other.coefficients
        attention_s, context_token_s = self._local.coefficients
        self.costs = InstanceCosts(step_s, token_s, knee, compute_token_s, attention_s, context_token_s)


def _daemon_fit(prior: DaemonCosts) -> RobustFit:
    return RobustFit((prior.message_s, prior.row_s, prior.query_s, prior.context_token_s))
