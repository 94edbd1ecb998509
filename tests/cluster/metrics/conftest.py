"""The cluster whose metrics are looked at: started once for the tests of a file."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_process import Cluster
from metrics_rig import Run, eventually, scrape
from test_serving import SMALL_ENGINE, prompt_of

CONFIG = {"instance": {**SMALL_ENGINE["instance"], "vllm_metric_names": True}, "gateway": {"vllm_metric_names": True}}


@pytest.fixture(scope="module")
def run(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """An instance with its daemon and a lender; requests one after the other."""
    arguments = ("--instances", "1", "--kvdaemons", "1", "--pool-mib", "2", "--dtype", "float32")
    with Cluster(random_llama, tmp_path_factory.mktemp("run") / "c", *arguments, config=CONFIG) as cluster:
        run = Run(cluster)
        # A fast machine may be done before the daemon has told the instance of its pool, as it does once a second.
        seeds = itertools.count(510)
        eventually(cluster, lambda: run.serve_and_look(prompt_of(600, seed=next(seeds)), 800))
        short = prompt_of(200, seed=52)
        for _ in range(2):  # the second time three blocks are there already
            run.count(short, cluster.complete(short, max_tokens=20, ignore_eos=True).token_ids)
        assert cluster.request(prompt_of(4000, seed=53), max_tokens=4).status_code == 400
        cluster.wait_until_no_block_is_held()
        run.use = {daemon.kvdaemon_id: dataclasses.asdict(daemon.use) for daemon in cluster.status().kvdaemons}
        run.quiet = scrape(cluster)
        yield run
