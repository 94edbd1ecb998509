"""``python -m benchmarks.dataplane``: what does a message cost over each of the data plane's transports?

Two processes with a core each. Beside the transports, in the same rounds: a bare blocking TCP socket, and memcpy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from benchmarks.echo_line import ACCEPT, Exchange, Line
from benchmarks.echo_socket import Memcpy, SocketLine, answer_on_socket
from benchmarks.echo_transport import TransportLine, Unavailable, answer_on_transport
from benchmarks.harness import Cell, Peer, Run, Samples, main
from benchmarks.pinned_process import PinnedProcess
from services.dataplane.select import Scheme

QUESTION = "what does a message cost over each of the data plane's transports?"
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
SOCKET, MEMCPY = "bare socket", "memcpy"
KIB = 1024
ECHOES = (Exchange("echo", 4 * KIB, 2000), Exchange("echo", 64 * KIB, 1000), Exchange("echo", 1024 * KIB, 100))
STREAM = Exchange("stream", 1024 * KIB, 256)
_QUICK_COUNT = 20
_GOAL_KIB = 64
_GOALS = {"shm": 1 / 3, "tcp": 1.2}  # round trip, of the bare socket's


@dataclass(frozen=True, slots=True)
class Answering:
    """A process that answers, and how to connect to it for messages of a size."""

    process: PinnedProcess
    connect: Callable[[int], TransportLine | SocketLine]


def measure(run: Run) -> None:
    """Starts the processes that answer and measures all exchanges."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("dataplane: needs two cores, one for each process")
    os.sched_setaffinity(0, {cores[0]})
    try:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dataplane-")))
            answering = _start(run, stack, cores[1], directory)
            for exchange in (*ECHOES, STREAM):
                _measure_exchange(run, answering, exchange)
    finally:
        os.sched_setaffinity(0, cores)


def _start(run: Run, stack: ExitStack, core: int, directory: Path) -> dict[str, Answering]:
    """A process for each peer that has another end."""
    run.progress.update("starting")
    process = stack.enter_context(PinnedProcess(core, answer_on_socket))
    address = process.hear()
    answering = {SOCKET: Answering(process, lambda _: SocketLine(address))}
    for scheme in run.options.transports:
        process = stack.enter_context(PinnedProcess(core, answer_on_transport, scheme, directory))
        place = process.hear()
        if isinstance(place, Unavailable):
            run.row({"part": "left out", "by": scheme, "reason": place.reason})
        else:
            answering[scheme] = Answering(process, partial(TransportLine, scheme, place))
    return answering


def _measure_exchange(run: Run, answering: Mapping[str, Answering], exchange: Exchange) -> None:
    """Over new connections, whose windows fit the messages."""
    if run.quick:
        exchange = replace(exchange, count=_QUICK_COUNT)
    run.progress.update(f"{exchange.kind} of {exchange.size // KIB} KiB")
    with ExitStack() as stack:
        peers = [Peer(MEMCPY, partial(Memcpy().measure, exchange))]
        for name, other in answering.items():
            other.process.tell(ACCEPT)
            line = stack.enter_context(closing(other.connect(exchange.size)))
            peers.append(Peer(name, partial(_exchange, other.process, line, exchange)))
        results = run.alternate(peers, run.options.repetitions)
    for name, samples in results.items():
        _record(run, exchange, name, samples, results[SOCKET])


def _exchange(process: PinnedProcess, line: Line, exchange: Exchange) -> float:
    process.tell(exchange)
    return line.measure(exchange)


def _record(run: Run, exchange: Exchange, name: str, samples: Samples, socket: Samples) -> None:
    kib = exchange.size // KIB
    of_socket = [own / bare for own, bare in zip(samples.values, socket.values, strict=True)]
    median = statistics.median(of_socket)
    row: dict[str, Cell] = {"part": exchange.kind, "message_kib": kib, "by": name}
    row["us"], row["us_spread"] = 1e6 * samples.median, 1e6 * samples.spread
    row["time_of_socket"], row["time_of_socket_min"], row["time_of_socket_max"] = median, min(of_socket), max(of_socket)
    if exchange.kind == "stream":
        row["gb_per_s"] = exchange.size / samples.median * 1e-9
    run.row(row)
    if exchange.kind == "echo" and kib == _GOAL_KIB and name in _GOALS:
        run.target(f"{name}_{kib}k_round_trip_of_socket", median, at_most=_GOALS[name])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    schemes = " ".join(SCHEMES)
    parser.add_argument("--transports", nargs="+", choices=SCHEMES, default=SCHEMES, help=f"default {schemes}")
    parser.add_argument("--repetitions", type=int, default=15, help="default %(default)s")


if __name__ == "__main__":
    sys.exit(main("dataplane", QUESTION, measure, add_arguments))
