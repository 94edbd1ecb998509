"""``python -m benchmarks.token_path``: what does a token cost between the engine and the client?

A cluster of one instance with a model of almost nothing serves 64 streams; what its processes take of the processor
then is what everything but the model takes. ``--against DIR`` measures another version of the project in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.checkpoints import SHAPES, CheckpointShape, random_prompt, write_random_checkpoint
from benchmarks.harness import Run, main
from benchmarks.http_load import Ask, send_load
from benchmarks.peers.ours import our_command
from benchmarks.peers.processes import Process
from benchmarks.peers.server import PinnedServer, ServerCommand, Serving
from services.core.errors import ConfigError, InfiniteLLMError

QUESTION = "what does a token cost between the engine and the client, by process?"
STREAMS = 64
PROMPT_TOKENS = 64
OUTPUT_TOKENS = 128
REPETITIONS = 7
_KV_BYTES = 256 << 20
_SEED = 7000
_LARGE = SHAPES["llama-100m"]
# One layer, and the vocabulary of a real model: drawing a token and telling its text cost what they always do.
_TINY: Mapping[str, int] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SHAPE = CheckpointShape("llama-tiny", _LARGE.config, {**_LARGE.settings, **_TINY})
CONTROL, ENGINE = "instance, first thread", "instance, engine"


@dataclass(slots=True)
class Version:
    """One version of the project, serving.

    Attributes:
        us_per_token: by part of the system, one value a repetition.
    """

    name: str
    server: PinnedServer
    us_per_token: dict[str, list[float]] = field(default_factory=dict)

    def record(self, before: Mapping[str, float], after: Mapping[str, float], tokens: int) -> None:
        for part, taken in after.items():
            self.us_per_token.setdefault(part, []).append(1e6 * (taken - before.get(part, 0.0)) / tokens)


def measure(run: Run) -> None:
    """Measures this version, and the other one in turn where one is given."""
    against: Path | None = run.options.against
    if against is not None and not (against / "services").is_dir():
        raise SystemExit(f"token_path: --against {against}: there is no services/ in it")
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    try:
        with tempfile.TemporaryDirectory(prefix="token-path-") as temporary, ExitStack() as stack:
            directory = Path(temporary)
            write_random_checkpoint(directory / SHAPE.name, SHAPE)
            serving = Serving(directory / SHAPE.name, (cores[0],), 4096, STREAMS, _KV_BYTES)
            versions = []
            for name, root in (("this", None), ("other", against))[: 1 if against is None else 2]:
                run.progress.update(f"starting the cluster of the {name} version")
                command = _command(serving, directory / name, root)
                server = stack.enter_context(PinnedServer(command, serving.cores, directory / f"{name}.log"))
                versions.append(Version(name, server))
            _measure_versions(run, versions)
    except InfiniteLLMError as error:
        raise SystemExit(f"token_path: {error}") from error
    finally:
        os.sched_setaffinity(0, cores)


def _measure_versions(run: Run, versions: list[Version]) -> None:
    draw = random.Random(_SEED)
    output_tokens = 16 if run.quick else OUTPUT_TOKENS
    for turn in run.rounds(REPETITIONS):
        asks = [Ask(random_prompt(SHAPE, PROMPT_TOKENS, draw), output_tokens) for _ in range(STREAMS)]
        for version in turn.order(versions):
            run.progress.update(f"{turn.label}: {version.name}")
            before = _taken(version.server)
            asyncio.run(send_load(version.server.address, version.server.model, asks))
            if turn.recorded:
                version.record(before, _taken(version.server), STREAMS * output_tokens)
    _record(run, versions)


def _record(run: Run, versions: list[Version]) -> None:
    this = versions[0]
    for part in sorted(this.us_per_token, key=lambda part: -statistics.median(this.us_per_token[part])):
        row: dict[str, str | int | float] = {"part": part}
        for version in versions:
            values = version.us_per_token.get(part, [0.0])
            row[f"{version.name}_us_per_token"] = statistics.median(values)
            row[f"{version.name}_spread"] = max(values) - min(values)
        if len(versions) == 2 and (other := statistics.median(versions[1].us_per_token.get(part, [0.0]))):
            ratio = statistics.median(this.us_per_token[part]) / other
            row["this_over_other"] = ratio
            run.summary(f"{part.replace(' ', '_').replace(',', '')}_this_over_other", ratio)
        run.row(row | {"repetitions": len(this.us_per_token[part])})
    run.summary("gateway_us_per_token", statistics.median(this.us_per_token["gateway"]))
    run.summary("instance_first_thread_us_per_token", statistics.median(this.us_per_token[CONTROL]))


def _taken(server: PinnedServer) -> dict[str, float]:
    """Processor time so far, in seconds, by part of the system."""
    taken: dict[str, float] = {}
    for process, total in server.processor_s().items():
        part = _part(process)
        if part == "instance":
            taken[CONTROL] = process.main_thread_s()
            taken[ENGINE] = total - taken[CONTROL]
        else:
            taken[part] = taken.get(part, 0.0) + total
    return taken


def _part(process: Process) -> str:
    """Which part of the system a process is: a service's name, or the program's own."""
    command = process.command
    services = [argument.removeprefix("services.") for argument in command if argument.startswith("services.")]
    return services[0].partition(".")[0] if services else Path(command[0].partition(" ")[0]).name if command else "?"


def _command(serving: Serving, directory: Path, root: Path | None) -> ServerCommand:
    """The cluster of this version, or of the one whose source tree is ``root``."""
    directory.mkdir()
    command = our_command(serving, directory)
    if root is None:
        return command
    root = root.resolve()
    if not list((root / "kernels" / "cpu").glob("_native*.so")):
        raise ConfigError(
            f"{root}: the CPU kernels are not built there: run 'python setup.py build_ext --inplace' in it"
        )
    return replace(command, directory=root, environment={"PYTHONPATH": f"{root}:{root / 'sdk'}"})


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="source tree of another version, its CPU kernels built, to compare with",
    )


if __name__ == "__main__":
    sys.exit(main("token_path", QUESTION, measure, _add_arguments))
