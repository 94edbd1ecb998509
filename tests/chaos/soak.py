"""A soak: random arrivals, clients that hang up, preemptions by tight memory, no faults; nothing may grow.

    make soak                     10 minutes; SOAK_MINUTES=60 for an hour

Requests come in waves of random length. In a wave they arrive at random, more than memory has room for, and a quarter
of the clients hang up after some tokens. Every token that comes is compared. Between two waves the cluster is left
alone for a moment: then no block may be held, every ledger must be sound, and each process's resident memory and open
files are measured.

Flat means: from the first third of these measurements (the warm-up left out) to the last third, the median of a
process's resident memory grows by at most RSS_TOLERANCE (a share of it) or RSS_SLACK_MIB, whichever is more, and that
of its open files by at most FILES_SLACK; and no block is held after any wave. The exit code is 0 if all of it holds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from disturbed_cluster import DisturbedCluster, Stream
from known_requests import KnownRequests
from random_llama import write_random_llama

from benchmarks.harness import format_table

WAVE_S = (2.0, 6.0)
ARRIVALS_PER_S = 1.5
STREAMS_AT_ONCE = 14  # of which 12 run at most; more wait
HANG_UP_SHARE = 0.25
DISTINCT_REQUESTS = 60  # more than the pools cache
ANSWER_TIMEOUT_S = 120.0

WARM_UP = (5, 0.2)  # the first so many measurements, or such a share of them: pools, caches and allocators fill
MEASUREMENTS = 12  # at least
RSS_TOLERANCE = 0.02
RSS_SLACK_MIB = 4.0
FILES_SLACK = 4.0
JOURNAL_TTL_S = 20  # so that Redis forgets as fast as it learns


@dataclass(frozen=True)
class Measurement:
    """One process while nobody asks for anything."""

    rss_mib: float
    files: int


@dataclass(frozen=True)
class Verdict:
    """One process's growth; the numbers are medians of the first and of the last third."""

    process: str
    rss_mib_before: float
    rss_mib_after: float
    files_before: float
    files_after: float

    @property
    def flat(self) -> bool:
        allowed = max(RSS_SLACK_MIB, RSS_TOLERANCE * self.rss_mib_before)
        return (
            self.rss_mib_after - self.rss_mib_before <= allowed and self.files_after - self.files_before <= FILES_SLACK
        )


class Soak:
    """The waves, and what was measured between them."""

    def __init__(self, cluster: DisturbedCluster, known: KnownRequests, seed: int) -> None:
        self._cluster = cluster
        self._known = known
        self._rng = random.Random(seed)
        self.wrong: list[str] = []
        self.measurements: list[dict[str, Measurement]] = []
        self.completed = self.hung_up = self.tokens = 0

    def wave(self) -> None:
        """Requests for a while, then none until nothing is held. Raises AssertionError if blocks stay held."""
        streams: list[Stream] = []
        ends = time.monotonic() + self._rng.uniform(*WAVE_S)
        while time.monotonic() < ends:
            time.sleep(self._rng.expovariate(ARRIVALS_PER_S))
            if sum(stream.running for stream in streams) < STREAMS_AT_ONCE:
                request = self._known.request(self._rng.randrange(DISTINCT_REQUESTS))
                leaves = self._rng.random() < HANG_UP_SHARE
                tokens = self._rng.randrange(len(request.answer)) if leaves else None
                streams.append(Stream(self._cluster.cluster, request, hang_up_after=tokens))
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        for stream in streams:
            stream.join(deadline)
            self._count(stream)
        self._cluster.cluster.wait_until_no_block_is_held(60.0)
        self._cluster.check_ledgers()

    def measure(self) -> None:
        self.measurements.append({name: _measure(pid) for name, pid in self._cluster.cluster.pids().items()})

    def verdicts(self) -> list[Verdict]:
        """One for each process."""
        counted = self.measurements[max(WARM_UP[0], int(WARM_UP[1] * len(self.measurements))) :]
        third = len(counted) // 3
        first, last = counted[:third], counted[-third:]
        return [
            Verdict(
                process,
                statistics.median(sample[process].rss_mib for sample in first),
                statistics.median(sample[process].rss_mib for sample in last),
                statistics.median(sample[process].files for sample in first),
                statistics.median(sample[process].files for sample in last),
            )
            for process in sorted(last[-1])
        ]

    def _count(self, stream: Stream) -> None:
        self.tokens += len(stream.token_ids)
        self.completed += stream.hang_up_after is None
        self.hung_up += stream.hang_up_after is not None
        if wrong := stream.wrong():
            self.wrong.append(wrong)


def _measure(pid: int) -> Measurement:
    resident_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Measurement(resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd")))


def run(minutes: float, seed: int, directory: Path, report: Path | None) -> int:
    model = directory / "random-llama"
    write_random_llama(model, logit_scale=4.0)
    known = KnownRequests(model)
    print(f"seed {seed}: computing what {DISTINCT_REQUESTS} requests must be answered")
    for number in range(DISTINCT_REQUESTS):
        known.request(number)
    with DisturbedCluster(model, directory / "run", {"gateway": {"journal_ttl_s": JOURNAL_TTL_S}}) as cluster:
        soak = Soak(cluster, known, seed)
        started = time.monotonic()
        while (passed := time.monotonic() - started) < 60 * minutes or len(soak.measurements) < MEASUREMENTS:
            soak.wave()
            soak.measure()
            rss = sum(measured.rss_mib for measured in soak.measurements[-1].values())
            print(
                f"[{passed:6.0f} s] {soak.completed} completed, {soak.hung_up} hung up, {soak.tokens} tokens, "
                f"{len(soak.wrong)} wrong; {rss:.0f} MiB resident",
                flush=True,
            )
        events = cluster.events()
    verdicts = soak.verdicts()
    rows = [asdict(verdict) | {"": "flat" if verdict.flat else "GROWS"} for verdict in verdicts]
    print(f"\n{format_table(rows)}\n")
    print(f"{events['request preempted']} preemptions, {events['spilled']} admissions with blocks elsewhere")
    print("\n".join(soak.wrong) or f"all {soak.tokens} tokens right, no block held after any of the waves")
    if report is not None:
        summary = {
            "minutes": minutes,
            "seed": seed,
            "completed": soak.completed,
            "hung_up": soak.hung_up,
            "tokens": soak.tokens,
            "wrong": len(soak.wrong),
            "preemptions": events["request preempted"],
            "processes": rows,
        }
        report.write_text(json.dumps(summary, indent=2) + "\n")
    return 0 if not soak.wrong and all(verdict.flat for verdict in verdicts) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Serves at random for a while and checks that nothing grows.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        return run(arguments.minutes, arguments.seed, Path(directory), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
