"""A cluster that has served a few requests, scraped as Prometheus would."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
from cluster_process import Cluster
from moving import Stream
from scraped import Scraped

INSTANCE, LENDER, DAEMON, GATEWAY, GMANAGER = "instance-0", "kvdaemon-mem-0", "kvdaemon-0", "gateway-0", "gmanager-0"
DEADLINE_S = 60.0


def scrape(cluster: Cluster) -> dict[str, Scraped]:
    """Every process that the gateway names, by member; but for one that has just died, which it may name still."""
    answer = {}
    for target in cluster.http.get("/metrics/targets").json():
        (address,) = target["targets"]
        try:
            response = httpx.get(f"http://{address}/metrics", timeout=20)
        except httpx.TransportError:
            continue
        assert response.status_code == 200, cluster.logs()
        answer[target["labels"]["member"]] = Scraped(response.text)
    return answer


def eventually(cluster: Cluster, check: Callable[[], object]) -> None:
    """Until the check holds: some of what is compared is told a moment later."""
    deadline = time.monotonic() + DEADLINE_S
    while not check():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)


@dataclass
class Run:
    """What was done with a cluster, and what it told.

    Attributes:
        pairs: blocks on each other daemon while a request ran: by /status, by the instance, by the daemon.
        busy, quiet: scraped while a request ran, and after all had ended.
        use: of the pools by /status, quiet.
    """

    cluster: Cluster
    prompt_tokens: int = 0
    generated_tokens: int = 0
    requests: int = 0
    pairs: tuple[dict[str, float], ...] = ()
    busy: dict[str, Scraped] = field(default_factory=dict)
    quiet: dict[str, Scraped] = field(default_factory=dict)
    use: dict[str, dict[str, int]] = field(default_factory=dict)

    def count(self, prompt: list[int], token_ids: list[int]) -> None:
        self.prompt_tokens += len(prompt)
        self.generated_tokens += len(token_ids)
        self.requests += 1

    def serve_and_look(self, prompt: list[int], max_tokens: int) -> bool:
        """One request, looked at while it runs; whether all told the same before it ended."""
        stream = Stream(self.cluster, prompt, max_tokens)
        stream.wait_for_tokens(3)
        agreed = False
        while stream.running and not agreed:
            agreed = self.look_at_pairs()
        self.count(prompt, stream.finish())
        return agreed

    def look_at_pairs(self) -> bool:
        """Scrapes, and waits for /status to say the same: it hears of blocks that have moved a moment later."""
        self.busy = scrape(self.cluster)
        instance, lender = self.busy[INSTANCE], self.busy[LENDER]
        borrowed = instance.by("kvdaemon_id", "infinite_llm_borrowed_blocks")
        lent = lender.by("kvdaemon_id", "infinite_llm_lent_blocks")
        # The daemon tells the instance of its pool once a second.
        told = borrowed == lent and instance.value("infinite_llm_kv_cache_usage_ratio") > 0
        told &= borrowed.get(LENDER, 0) >= 3
        deadline = time.monotonic() + 1.0
        while told and time.monotonic() < deadline:
            for where in self.cluster.placements():
                by_status = {name: blocks for name, blocks in where.items() if name != DAEMON}
                self.pairs = by_status, borrowed, lent
                if by_status == borrowed:
                    return True
        return False
