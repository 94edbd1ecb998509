"""``python -m benchmarks.vllm_bench``: what does vLLM's own load generator say of this project's server?

``vllm bench serve``, unmodified, from the environment that ``make peers`` creates, sends random prompts to the gateway
by both of OpenAI's APIs. A request that fails, or is answered with another number of tokens, ends the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SHAPES, write_random_checkpoint
from benchmarks.harness import Run, main
from benchmarks.peers.ours import our_command
from benchmarks.peers.server import PinnedServer, Serving
from benchmarks.peers.vllm import DEFAULT_ENVIRONMENT
from services.core.errors import ConfigError, InfiniteLLMError

QUESTION = "what does `vllm bench serve` say of this server?"
SHAPE = SHAPES["llama-100m"]
STREAMS = 8
INPUT_TOKENS, OUTPUT_TOKENS = 256, 64
CLIENT_TIMEOUT_S = 1800.0
_KV_BYTES = 1 << 30
# What `vllm bench serve` runs; the command itself asks for metadata that a build for CPUs goes without.
_CLIENT = (
    "import argparse; from vllm.benchmarks import serve; parser = argparse.ArgumentParser(); "
    "serve.add_cli_args(parser); serve.main(parser.parse_args())"
)
_ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def measure(run: Run) -> None:
    """Starts a cluster and has both APIs loaded."""
    prompts = 16 if run.quick else 64
    cores = tuple(sorted(os.sched_getaffinity(0)))
    try:
        with tempfile.TemporaryDirectory(prefix="vllm-bench-") as temporary:
            directory = Path(temporary)
            checkpoint = directory / SHAPE.name
            write_random_checkpoint(checkpoint, SHAPE)
            (checkpoint / "chat_template.jinja").write_text(_TEMPLATE)
            serving = Serving(checkpoint, cores, 4096, STREAMS, _KV_BYTES)
            run.progress.update("starting the cluster")
            command = our_command(serving, directory)
            with PinnedServer(command, cores, directory / "ours.log") as server:
                for backend in _ENDPOINTS:
                    run.progress.update(f"vllm bench serve --backend {backend}")
                    result = _client(run.options.environment, server, backend, checkpoint, prompts, directory)
                    run.row(
                        {
                            "backend": backend,
                            "requests": result["completed"],
                            "output_tokens_per_s": result["output_throughput"],
                            "ttft_ms": result["median_ttft_ms"],
                            "ttft_p99_ms": result["p99_ttft_ms"],
                            "tpot_ms": result["median_tpot_ms"],
                            "tpot_p99_ms": result["p99_tpot_ms"],
                        }
                    )
                    run.summary(f"{backend.replace('-', '_')}_output_tokens_per_s", result["output_throughput"])
    except InfiniteLLMError as error:
        raise SystemExit(f"vllm_bench: {error}") from error


def _client(
    environment: Path, server: PinnedServer, backend: str, checkpoint: Path, prompts: int, directory: Path
) -> dict[str, Any]:
    """One run of the load generator; its own table goes to stderr. Raises ConfigError where it did not go well."""
    python = environment / "bin" / "python"
    if not python.exists():
        raise ConfigError(f"{environment} is no virtual environment with vLLM: create it with 'make peers'")
    file = f"{backend}.json"
    command = [
        *(str(python), "-c", _CLIENT, "--backend", backend, "--base-url", f"http://{server.address}"),
        *("--endpoint", _ENDPOINTS[backend], "--model", server.model, "--tokenizer", str(checkpoint)),
        *("--dataset-name", "random", "--num-prompts", str(prompts), "--max-concurrency", str(STREAMS)),
        *("--random-input-len", str(INPUT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS), "--ignore-eos"),
        *("--percentile-metrics", "ttft,tpot", "--disable-tqdm", "--save-result"),
        *("--result-dir", str(directory), "--result-filename", file),
    ]
    # Away from this repository, whose packages are no business of the client.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    ended = subprocess.run(command, env=variables, cwd=directory, stdout=sys.stderr, timeout=CLIENT_TIMEOUT_S)
    if ended.returncode:
        raise ConfigError(f"vllm bench serve ended with {ended.returncode}; what it said is above")
    result: dict[str, Any] = json.loads((directory / file).read_text())
    if result["completed"] != prompts or result["total_output_tokens"] != prompts * OUTPUT_TOKENS:
        raise ConfigError(
            f"{result['completed']} of {prompts} requests were answered, with {result['total_output_tokens']} tokens "
            f"in place of {prompts * OUTPUT_TOKENS}"
        )
    return result


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--environment", type=Path, default=DEFAULT_ENVIRONMENT, help="vLLM's virtual environment (%(default)s)"
    )


if __name__ == "__main__":
    sys.exit(main("vllm_bench", QUESTION, measure, _add_arguments))
