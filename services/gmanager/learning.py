"""What the gManager learns from the timings in heartbeats: costs of every process, output of every instance. Pure.

The cost model follows small changes well and large ones slowly, as outliers are many. So a process begins with a guess
whose *scale* is that of its first timings, and it begins again when predictions have been far off for a while (another
device rate, other processes beside it). What the guess says of ratios, the fits find out.

Learning from one timing takes longer than all else that a heartbeat causes. So in a large cluster each process is
listened to now and then, ``TIMINGS_PER_S`` of all together; a few hundred processes are listened to always.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from services.core.placement import Timings
from services.core.timings import RemoteTiming, StepTiming
from services.gmanager.cost_model import CostModel, DaemonCosts, InstanceCosts
from services.gmanager.output_rate import OutputRates

# A step of a small model on a processor core.
GUESSED_INSTANCE = InstanceCosts(
    step_s=5e-3, token_s=2e-4, knee_tokens=16.0, compute_token_s=2e-4, attention_s=1e-4, context_token_s=1e-7
)
GUESSED_DAEMON = DaemonCosts(message_s=1e-4, row_s=2e-6, query_s=2e-5, context_token_s=1e-7)
FIRST = 5  # timings that set the scale
LEAST = 0.01  # of a guess: what a coefficient that was learned to be 0 begins with when it serves as a guess itself
FAR_OFF = 0.5  # median relative error of predictions ...
_REMEMBERED = 16  # ... over as many timings at least
TIMINGS_PER_S = 1000.0


@dataclass(frozen=True, slots=True)
class KnownCosts:
    """Costs of the processes of which enough has been observed, by id."""

    instances: Mapping[str, InstanceCosts] = field(default_factory=dict)
    kvdaemons: Mapping[str, DaemonCosts] = field(default_factory=dict)


class Learning:
    """All that was learned since this gManager leads."""

    def __init__(self) -> None:
        self.rates = OutputRates()
        self._model = CostModel(GUESSED_INSTANCE, GUESSED_DAEMON)
        self._steps: dict[str, deque[StepTiming]] = {}  # the latest of each instance
        self._answers: dict[str, deque[RemoteTiming]] = {}  # the latest of each daemon that were waited for
        self._next: dict[str, float] = {}  # when each process's timings are learned from again
        self._known_instances: set[str] = set()
        self._known_kvdaemons: set[str] = set()

    def observe(self, member: str, timings: Timings, now: float) -> None:
        """Takes in what "instance/<id>" or "kvdaemon/<id>" measured."""
        if not timings:
            return
        _, _, member_id = member.partition("/")
        due = now >= self._next.setdefault(member, now)
        if due:
            self._next[member] = now + (len(self._next) - 1) / TIMINGS_PER_S  # after all others
        for timing in timings:
            if isinstance(timing, StepTiming):
                self.rates.observe(member_id, timing, now)
                if due:
                    self._observe_step(member_id, timing)
            elif due and member_id in self._known_kvdaemons:
                self._model.observe_hosting(member_id, timing)

    @property
    def known(self) -> KnownCosts:
        """As of now: it does not change with what is observed later."""
        return KnownCosts(
            {name: self._model.instance(name) for name in self._known_instances},
            {name: self._model.kvdaemon(name) for name in self._known_kvdaemons},
        )

    def step_error(self, instance_id: str) -> float | None:
        """Median relative error of the predicted time of a decode step; None before the first prediction."""
        return self._model.step_error(instance_id) if instance_id in self._known_instances else None

    def keep(self, instances: Collection[str], kvdaemons: Collection[str]) -> None:
        """Forgets processes that have left the cluster."""
        gone_instances, gone_kvdaemons = self._steps.keys() - set(instances), self._answers.keys() - set(kvdaemons)
        self.rates.forget(gone_instances)
        for instance_id in gone_instances:
            del self._steps[instance_id]
        for kvdaemon_id in gone_kvdaemons:
            del self._answers[kvdaemon_id]
        for member in self._next.keys() - {f"instance/{i}" for i in instances} - {f"kvdaemon/{k}" for k in kvdaemons}:
            del self._next[member]
        self._known_instances -= gone_instances
        self._known_kvdaemons -= gone_kvdaemons
        self._model.forget(tuple(gone_instances), tuple(gone_kvdaemons))

    # ------------------------------------------------------------ instances

    def _observe_step(self, instance_id: str, timing: StepTiming) -> None:
        latest = self._steps.setdefault(instance_id, deque(maxlen=_REMEMBERED))
        latest.append(timing)
        if instance_id not in self._known_instances:
            if len(latest) < FIRST:
                return
            self._model.calibrate_instance(instance_id, scaled_costs(GUESSED_INSTANCE, latest))
            self._known_instances.add(instance_id)
        for part in timing.remotes:
            self._meet(part, self._model.instance(instance_id))
        remotes = tuple(part for part in timing.remotes if self._says_something(part))
        self._model.observe_step(instance_id, timing._replace(remotes=remotes))
        error = self._model.step_error(instance_id)
        if error is not None and error > FAR_OFF and len(latest) == _REMEMBERED:
            self._model.calibrate_instance(instance_id, begin_again(self._model.instance(instance_id), latest))
            latest.clear()

    # ------------------------------------------------------------ daemons

    def _meet(self, part: RemoteTiming, debtor: InstanceCosts) -> None:
        """A daemon that is heard of for the first time computes like its debtor; the way there is as long as its first
        answers say."""
        if part.late <= 0.5 or part.kvdaemon_id in self._known_kvdaemons or part.messages <= 0:
            return
        answers = self._answers.setdefault(part.kvdaemon_id, deque(maxlen=FIRST))
        answers.append(part)
        if len(answers) == FIRST:
            guess = like_instance(debtor, part.messages)
            self._model.calibrate_kvdaemon(part.kvdaemon_id, scaled_way(guess, answers))
            self._known_kvdaemons.add(part.kvdaemon_id)

    def _says_something(self, part: RemoteTiming) -> bool:
        """Answers that came while local attention was computed give a bound: news only if more was expected."""
        if part.kvdaemon_id not in self._known_kvdaemons:
            return False
        expected_s = self._model.kvdaemon(part.kvdaemon_id).answer_s(part.messages, part.rows, part.context_tokens)
        return part.late > 0.5 or part.answer_s < expected_s


def like_instance(costs: InstanceCosts, layers: float) -> DaemonCosts:
    """A daemon that computes as fast as an instance does, with the usual way there and back."""
    return replace(
        GUESSED_DAEMON,
        query_s=max(costs.attention_s / layers, LEAST * GUESSED_DAEMON.query_s),
        context_token_s=max(costs.context_token_s, LEAST * GUESSED_DAEMON.context_token_s),
    )


def begin_again(learned: InstanceCosts, timings: Collection[StepTiming]) -> InstanceCosts:
    """What was learned, to the scale of the timings; all coefficients > 0, or nothing could be learned of them."""
    scaled, guess = scaled_costs(learned, timings), scaled_costs(GUESSED_INSTANCE, timings)
    return InstanceCosts(
        step_s=max(scaled.step_s, LEAST * guess.step_s),
        token_s=max(scaled.token_s, LEAST * guess.token_s),
        knee_tokens=scaled.knee_tokens,
        compute_token_s=max(scaled.compute_token_s, LEAST * guess.compute_token_s),
        attention_s=max(scaled.attention_s, LEAST * guess.attention_s),
        context_token_s=max(scaled.context_token_s, LEAST * guess.context_token_s),
    )


def scaled_costs(guess: InstanceCosts, timings: Collection[StepTiming]) -> InstanceCosts:
    """``guess`` times what brings its median to that of the timings: one factor for attention, one for all else."""
    other = _scale([(t.step_s - t.attention_s, guess.other_s(t.batch_tokens)) for t in timings])
    local = _scale(
        [(t.local_attention_s, guess.local_s(t.local_context_tokens)) for t in timings if not t.prefill_tokens]
    )
    return InstanceCosts(
        step_s=guess.step_s * other,
        token_s=guess.token_s * other,
        knee_tokens=guess.knee_tokens,
        compute_token_s=guess.compute_token_s * other,
        attention_s=guess.attention_s * local,
        context_token_s=guess.context_token_s * local,
    )


def scaled_way(guess: DaemonCosts, answers: Collection[RemoteTiming]) -> DaemonCosts:
    """``guess`` with a way there and back that brings its median to that of the answers, at least a tenth as long."""
    ways = []
    for part in answers:
        way_s = part.messages * (guess.message_s + guess.row_s * part.rows)
        computing_s = guess.compute_s(part.messages, part.context_tokens)
        ways.append((max(part.answer_s - computing_s, 0.1 * way_s), way_s))
    way = _scale(ways)
    return replace(guess, message_s=guess.message_s * way, row_s=guess.row_s * way)


def _scale(pairs: Sequence[tuple[float, float]]) -> float:
    """Median of measured over guessed; 1 where nothing was measured."""
    ratios = [measured / guessed for measured, guessed in pairs if measured > 0 and guessed > 0]
    return statistics.median(ratios) if ratios else 1.0
