"""``infinite-llm demo`` (``make run``): one prompt, too long for any one process's memory, answered by several.

The checkpoint is the needle model, whose right answer is known: the prompt hides a key with its value in a long
haystack and asks for the value. Every KV daemon's pool holds a quarter of the prompt's KV cache at most. So the
instance keeps some of the rBlocks in the pool beside it, the others lie with daemons that lend memory, and every token
is computed by sending queries there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from infinitellm import AsyncClient, Finished, InfiniteLLMError, Progress, RequestStatus, Tokens
from services.core.errors import ConfigError
from services.launcher.checkpoint_info import inspect_checkpoint
from services.launcher.cluster import LocalCluster
from services.launcher.console import Console
from services.launcher.needle.spec import Preset, needle_spec
from services.launcher.needle.task import MIN_CONTEXT_TOKENS, NeedleTask, make_task
from services.launcher.options import ClusterOptions
from services.launcher.plan import DEFAULT_BLOCK_TOKENS
from services.launcher.session import run_cluster
from services.launcher.status import placement_text
from services.launcher.up import curl_line, print_addresses

PRESET: Preset = "std"
POOLS_PER_PROMPT = 4
MIN_POOL_MIB = 18  # an instance needs room for its batch in the pool beside it
DEFAULT_TOKENS = 49_152
_ANSWER_TIMEOUT_S = 3600.0
_STATUS_INTERVAL_S = 0.5
_BAR = 24


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The demonstration.

    Attributes:
        tokens: length of the prompt.
        depth: place of the needle, from 0 (start of the haystack) to 1 (its end).
        oneshot: end after the answer.
    """

    tokens: int = DEFAULT_TOKENS
    depth: float = 0.37
    seed: int = 1
    oneshot: bool = False
    http_port: int = 8000
    grpc_port: int = 50051
    run_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.tokens < MIN_CONTEXT_TOKENS:
            raise ConfigError(f"--tokens must be at least {MIN_CONTEXT_TOKENS}, got {self.tokens}")
        if not 0 <= self.depth <= 1:
            raise ConfigError(f"--depth must lie between 0 and 1, got {self.depth}")


def demo(options: DemoOptions) -> int:
    """Runs the demonstration; answers 0 only if the cluster's answer was right."""
    console = Console()
    model = _needle_checkpoint(console)
    cluster_options = plan_demo(options, model)
    vocabulary = needle_spec(PRESET).vocabulary
    task = make_task(vocabulary, options.tokens, options.depth, options.seed)

    async def body(cluster: LocalCluster, console: Console) -> int:
        right = await _ask(cluster, console, task, cluster_options)
        if not options.oneshot:
            console.line()
            print_addresses(cluster, console)
            key, value = "314159", "27182818"
            prompt = f"straw <|key|>{key}<|val|>{value}</s> and more straw <|key|>{key}<|val|>"
            console.line(curl_line(cluster.http_address, cluster.checkpoint, prompt, max_tokens=16))
        return 0 if right else 1

    return asyncio.run(run_cluster(cluster_options, console, body, serve=not options.oneshot))


def plan_demo(options: DemoOptions, model: Path) -> ClusterOptions:
    """One instance, pools of a quarter of the prompt's KV cache, and memory-only daemons that could hold all of it."""
    cluster = ClusterOptions(
        model=model,
        instances=1,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        run_dir=options.run_dir,
        # The pool beside the instance is small; few sequences at once leave most of it for the prompt.
        overlay={"instance": {"max_num_seqs": 4}},
    )
    geometry = inspect_checkpoint(model).geometry(DEFAULT_BLOCK_TOKENS, cluster.dtype)
    assert geometry is not None, "the needle checkpoint says what its KV cache is like"
    blocks = geometry.blocks_for(options.tokens)
    pool_mib = blocks * geometry.block_bytes // POOLS_PER_PROMPT >> 20
    if pool_mib < MIN_POOL_MIB:
        least = (MIN_POOL_MIB << 20) * POOLS_PER_PROMPT // geometry.block_bytes * DEFAULT_BLOCK_TOKENS
        raise ConfigError(f"--tokens {options.tokens}: too short to need several pools; give at least {least}")
    blocks_per_pool = (pool_mib << 20) // geometry.block_bytes
    return dataclasses.replace(cluster, pool_mib=pool_mib, kvdaemons=-(-blocks // blocks_per_pool))


def _needle_checkpoint(console: Console) -> Path:
    """The needle checkpoint in the user's cache, built if it is not there. Its path says which builder made it."""
    sources = sorted((Path(__file__).parent / "needle").glob("*.py"))
    digest = hashlib.blake2b(b"".join(source.read_bytes() for source in sources), digest_size=6).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infinite-llm"
    path = cache / digest / f"needle-{PRESET}"
    if not (path / "config.json").is_file():
        console.line(f"building the needle checkpoint in {path}")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as building:
            # In a process of its own: the launcher needs no torch.
            command = [sys.executable, "-m", "services.launcher.needle_model", building, "--preset", PRESET]
            built = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if built.returncode != 0:
                raise ConfigError(f"the needle checkpoint could not be built:\n{built.stderr}")
            path.mkdir(parents=True, exist_ok=True)
            for file in sorted(Path(building).iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(path / file.name)
    return path


async def _ask(cluster: LocalCluster, console: Console, task: NeedleTask, options: ClusterOptions) -> bool:
    """Sends the prompt, shows what happens, and says whether the answer is right."""
    geometry = cluster.checkpoint.geometry(DEFAULT_BLOCK_TOKENS, options.dtype)
    assert geometry is not None
    prompt_tokens = len(task.prompt_token_ids)
    kv_mib = geometry.blocks_for(prompt_tokens) * geometry.block_bytes / 2**20
    console.line()
    console.line(
        f"A haystack of {prompt_tokens:,} tokens: {kv_mib:.0f} MiB of KV cache; every process has a pool of "
        f"{options.pool_mib} MiB. What value belongs to key {task.key_text}?"
    )
    token_ids: list[int] = []
    finished: Finished | None = None
    async with AsyncClient(cluster.grpc_address) as client:
        watcher = _PlacementWatcher(client)
        watching = asyncio.create_task(watcher.run())
        prefill = _PrefillProgress(console)
        max_tokens = len(task.expected_token_ids) + 8
        try:
            events = client.generate(
                task.prompt_text, max_tokens=max_tokens, progress=True, timeout_s=_ANSWER_TIMEOUT_S
            )
            async for event in events:
                watcher.request_id = event.request_id
                if isinstance(event, Progress):
                    prefill.show(event, watcher.latest)
                elif isinstance(event, Tokens):
                    if not token_ids:
                        await watcher.look()
                        prefill.end(prompt_tokens)
                        if watcher.latest is not None:
                            console.line(placement_text(watcher.latest))
                        console.write("\nanswer: ")
                    token_ids += event.ids
                    console.write(event.text)
                elif isinstance(event, Finished):
                    finished = event
        finally:
            watching.cancel()
            await asyncio.wait([watching])
    console.line()
    eos = task.expected_token_ids[-1]
    answer = token_ids[:-1] if token_ids[-1:] == [eos] else token_ids
    right = finished is not None and finished.reason == "stop" and tuple(answer) == task.expected_token_ids[:-1]
    console.line("right" if right else f"WRONG: the value is {task.expected_text}, then the text ends")
    return right


class _PlacementWatcher:
    """Asks the cluster now and then where the blocks of one request lie."""

    def __init__(self, client: AsyncClient) -> None:
        self.request_id = ""
        self.latest: RequestStatus | None = None
        self._client = client

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_STATUS_INTERVAL_S)
            await self.look()

    async def look(self) -> None:
        try:
            state = await self._client.cluster_status(_STATUS_INTERVAL_S * 4)
        except InfiniteLLMError:
            return  # the placement is only shown; the answer does not depend on it
        for request in state.requests:
            if request.request_id == self.request_id and request.placement:
                self.latest = request


class _PrefillProgress:
    """The progress bar of a prefill."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started_at = time.monotonic()

    def show(self, progress: Progress, placed: RequestStatus | None) -> None:
        share = progress.computed_tokens / max(1, progress.prompt_tokens)
        bar = "#" * round(share * _BAR)
        rate = progress.computed_tokens / max(1e-3, time.monotonic() - self._started_at)
        parts = () if placed is None else placed.placement
        blocks = ", ".join(f"{part.kvdaemon_id} {part.num_blocks}" for part in parts)
        self._console.status(
            f"prefill [{bar:.<{_BAR}}] {progress.computed_tokens:,}/{progress.prompt_tokens:,} {rate:,.0f} tokens/s"
            + (f"  rBlocks: {blocks}" if blocks else "")
        )

    def end(self, prompt_tokens: int) -> None:
        elapsed = time.monotonic() - self._started_at
        self._console.line(
            f"prefill: {prompt_tokens:,} tokens in {elapsed:.1f} s, {prompt_tokens / elapsed:,.0f} tokens/s"
        )
