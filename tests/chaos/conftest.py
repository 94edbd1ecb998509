"""How many random schedules run, and from which seed: CHAOS_SCHEDULES and CHAOS_SEED in the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disturbed_cluster import DisturbedCluster
from known_requests import KnownRequests
from random_llama import write_random_llama

SEED = int(os.environ.get("CHAOS_SEED", "1"))
SCHEDULES = int(os.environ.get("CHAOS_SCHEDULES", "3"))  # a handful, as a part of all tests

_lines = pytest.StashKey[list[str]]()


def pytest_report_header() -> str:
    return f"chaos: {SCHEDULES} schedules, CHAOS_SEED={SEED}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "schedule_number" in metafunc.fixturenames:
        metafunc.parametrize("schedule_number", range(SCHEDULES))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_lines] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_lines]:
        terminalreporter.section(f"chaos (CHAOS_SEED={SEED})")
        terminalreporter.write_line("\n".join(config.stash[_lines]))


@pytest.fixture(scope="session")
def chaos_seed() -> int:
    return SEED


@pytest.fixture
def tell(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Adds a line to what is shown in the end."""
    return pytestconfig.stash[_lines].append


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See random_llama.py; near-ties are so rare that answers of hundreds of tokens are known."""
    path = tmp_path_factory.mktemp("models") / "random-llama"
    write_random_llama(path, logit_scale=4.0)
    return path


@pytest.fixture(scope="session")
def known(random_llama: Path) -> KnownRequests:
    return KnownRequests(random_llama)


class ClusterPool:
    """One cluster at a time, used by several schedules: starting one takes longer than a schedule."""

    def __init__(self, model: Path, directories: pytest.TempPathFactory) -> None:
        self._model = model
        self._directories = directories
        self._running: DisturbedCluster | None = None

    def take(self, fresh: bool = False) -> DisturbedCluster:
        """A sound cluster; it is not given again until ``give_back``."""
        if fresh:
            self.close()
        running, self._running = self._running, None
        return running or DisturbedCluster(self._model, self._directories.mktemp("run") / "c").__enter__()

    def give_back(self, cluster: DisturbedCluster, usable: bool) -> None:
        if usable:
            self._running = cluster
        else:
            cluster.__exit__()

    def close(self) -> None:
        if self._running is not None:
            self.give_back(self._running, usable=False)
            self._running = None


@pytest.fixture(scope="module")
def clusters(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterPool]:
    pool = ClusterPool(random_llama, tmp_path_factory)
    yield pool
    pool.close()
