"""``infinite-llm top``: pools, instances and who lends to whom, live."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter

import infinitellm
from infinitellm import Client, ClusterStatus, KvDaemonStatus, RetryPolicy
from services.launcher.console import table

_BAR = 30  # characters
_TIMEOUT_S = 5.0
_HOME_AND_CLEAR = "\x1b[H\x1b[J"
_MOST_LOANS = 20  # rows


def top(address: str, api_key: str | None, interval_s: float, frames: int | None) -> int:
    """Shows the cluster again and again until Ctrl-C, or so many times; a gateway that is away is waited for.

    Raises:
        infinitellm.InfiniteLLMError: the first answer was an error.
    """
    shown = 0
    with Client(address, api_key=api_key, retry=RetryPolicy(attempts=1)) as client:
        try:
            while frames is None or shown < frames:
                if shown:
                    time.sleep(interval_s)
                try:
                    text = top_text(client.cluster_status(_TIMEOUT_S))
                except infinitellm.InfiniteLLMError as error:
                    if not shown:
                        raise
                    text = f"no answer: {error}"
                _show(f"{time.strftime('%H:%M:%S')}  {address}  Ctrl-C ends it\n\n{text}")
                shown += 1
        except KeyboardInterrupt:
            pass
    return 0


def top_text(state: ClusterStatus) -> str:
    """One frame: pools as bars, instances, and the blocks that lie with others, most first."""
    running = sum(instance.running_requests for instance in state.instances)
    waiting = sum(instance.waiting_requests for instance in state.instances)
    total = sum(daemon.use.total for daemon in state.kvdaemons)
    taken = sum(_taken(daemon) for daemon in state.kvdaemons)
    head = f"{running} requests run, {waiting} wait; {taken:,} of {total:,} rBlocks are taken"
    pools = [
        (
            daemon.kvdaemon_id,
            _bar(daemon),
            f"{100 * _taken(daemon) / max(1, daemon.use.total):.0f}%",
            str(daemon.use.total),
        )
        for daemon in sorted(state.kvdaemons, key=lambda daemon: daemon.kvdaemon_id)
    ]
    instances = [
        (
            instance.instance_id,
            str(instance.running_requests),
            str(instance.waiting_requests),
            instance.local_kvdaemon_id,
        )
        for instance in sorted(state.instances, key=lambda instance: instance.instance_id)
    ]
    loans: Counter[tuple[str, str]] = Counter()
    for request in state.requests:
        for part in request.placement:
            if not part.local:
                loans[part.kvdaemon_id, request.instance_id] += part.num_blocks
    parts = [
        head,
        table(("POOL", "# in use  = reserved  w workspace  . cached", "TAKEN", "RBLOCKS"), pools),
        table(("INSTANCE", "RUNNING", "WAITING", "OWN POOL"), instances),
    ]
    if loans:
        rows = [(lender, borrower, str(blocks)) for (lender, borrower), blocks in loans.most_common(_MOST_LOANS)]
        parts.append(table(("LENDS", "TO", "RBLOCKS"), rows))
    else:
        parts.append("nobody borrows")
    return "\n\n".join(parts)


def _taken(daemon: KvDaemonStatus) -> int:
    """Blocks that nobody else can have."""
    use = daemon.use
    return use.in_use + use.reserved + use.workspace


def _bar(daemon: KvDaemonStatus) -> str:
    """What a pool is full of; every part that is there at all shows."""
    use = daemon.use
    bar = ""
    for sign, count in (("#", use.in_use), ("=", use.reserved), ("w", use.workspace), (".", use.cached)):
        bar += sign * (max(1, round(_BAR * count / max(1, use.total))) if count else 0)
    return f"[{bar[:_BAR]:<{_BAR}}]"


def _show(text: str) -> None:
    if sys.stdout.isatty():
        size = shutil.get_terminal_size()
        text = "\n".join(line[: size.columns] for line in text.splitlines()[: size.lines - 1])
        sys.stdout.write(_HOME_AND_CLEAR)
    print(text, flush=True)
