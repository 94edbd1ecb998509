"""What is done to a cluster while it serves: drawn from a seed, so that a failure can be repeated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

INSTANCES = ("instance-0", "instance-1")
LOCAL_DAEMONS = ("kvdaemon-0", "kvdaemon-1")
MEMORY_DAEMONS = ("kvdaemon-mem-0", "kvdaemon-mem-1", "kvdaemon-mem-2")
SERVICES = (*INSTANCES, *LOCAL_DAEMONS, *MEMORY_DAEMONS, "gmanager-0", "etcd", "redis")

SHORT_STOP_S = (0.2, 4.0)  # ends before anybody's patience does (5 s of silence)
LONG_STOP_S = (6.5, 10.0)  # everybody has given the process up when it goes on

# The launcher starts no new etcd. Without one nothing that dies is found again, so while etcd is dead only those
# processes are harmed that live through it, and Redis, which nobody needs.
HARMED_WITHOUT_ETCD = (*MEMORY_DAEMONS, "gmanager-0", "redis")


@dataclass(frozen=True)
class Disturbance:
    """One process is killed, or stopped and continued.

    Attributes:
        progress: it happens when this fraction of all tokens has been generated ...
        delay_s: ... and this time has passed since.
        stop_s: how long it is stopped; None kills it.
    """

    process: str
    progress: float
    delay_s: float
    stop_s: float | None

    def __str__(self) -> str:
        what = "kill" if self.stop_s is None else f"stop {self.stop_s:.1f} s"
        return f"{what} {self.process} at {self.progress:.0%} + {self.delay_s:.1f} s"


@dataclass(frozen=True)
class Schedule:
    """Requests that are sent at once, and what happens meanwhile.

    Attributes:
        requests: numbers of KnownRequests.
        disturbances: in order of progress.
        needs_fresh_cluster: its cluster cannot be used again.
    """

    seed: str
    requests: tuple[int, ...]
    disturbances: tuple[Disturbance, ...]
    needs_fresh_cluster: bool

    def __str__(self) -> str:
        return f"{self.seed}: {len(self.requests)} requests; " + "; ".join(map(str, self.disturbances))


def draw_schedule(seed: int, number: int) -> Schedule:
    """Schedule ``number`` of a run. Every sixth kills etcd for good."""
    name = f"{seed}/{number}"
    rng = random.Random(name)
    first = rng.randrange(1 << 20)
    requests = tuple(range(first, first + rng.randint(6, 10)))
    if number % 6 == 5:
        disturbances = [_disturbance(rng, ("etcd",), kill=True)]
        disturbances += [_disturbance(rng, HARMED_WITHOUT_ETCD, kill=False) for _ in range(rng.randint(1, 2))]
    else:
        processes = rng.choices(SERVICES, k=rng.randint(1, 5))
        disturbances = [
            _disturbance(rng, (process,), kill=process != "etcd" and rng.random() < 0.5) for process in processes
        ]
    ordered = tuple(sorted(disturbances, key=lambda disturbance: disturbance.progress))
    return Schedule(name, requests, ordered, number % 6 == 5)


def _disturbance(rng: random.Random, processes: Sequence[str], kill: bool) -> Disturbance:
    """Half of them happen while the first prompts are computed, the others at any time later."""
    progress = 0.0 if rng.random() < 0.5 else rng.uniform(0.01, 0.9)
    stop_s = None if kill else rng.uniform(*rng.choice((SHORT_STOP_S, LONG_STOP_S)))
    return Disturbance(rng.choice(processes), progress, rng.uniform(0.0, 1.5), stop_s)
