"""vLLM's OpenAI server on CPU, from the environment that ``make peers`` creates.

Which settings are its best here was tried; benchmarks/README.md says how and what came out.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.server import ServerCommand, Serving
from services.core.errors import ConfigError
from services.launcher.ports import HOST, free_ports

MAX_BATCH_TOKENS = 1024
DEFAULT_ENVIRONMENT = Path(__file__).resolve().parents[2] / ".peers" / "vllm"


def vllm_command(
    serving: Serving, environment: Path, extra: tuple[str, ...] = (), *, tensor_parallel: bool = False
) -> ServerCommand:
    """API server, engine and worker.

    Args:
        environment: its virtual environment.
        extra: further arguments of its command line.
        tensor_parallel: a worker on each core, with its share of every layer and of the KV cache; else one worker with
            a thread on each core.

    Raises:
        ConfigError: there is no such environment.
    """
    python = environment / "bin" / "python"
    if not python.exists():
        raise ConfigError(f"{environment} is no virtual environment with vLLM: create it with 'make peers'")
    (port,) = free_ports(1)
    workers = len(serving.cores) if tensor_parallel else 1
    argv = (
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(serving.checkpoint)),
        *("--served-model-name", serving.checkpoint.name, "--host", HOST, "--port", str(port)),
        *("--dtype", "bfloat16", "--max-model-len", str(serving.max_model_len)),
        *("--max-num-seqs", str(serving.max_num_seqs), "--kv-cache-memory-bytes", str(serving.kv_bytes // workers)),
        *("--max-num-batched-tokens", str(MAX_BATCH_TOKENS), "--tensor-parallel-size", str(workers)),
        *("--distributed-executor-backend", "mp" if tensor_parallel else "uni"),
        *("--enable-prompt-tokens-details", "--disable-uvicorn-access-log"),
        *extra,
    )
    caches = environment / "cache"  # of what is compiled at the first start
    variables = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "LD_PRELOAD": str(environment / "lib" / "libiomp5.so"),
        "VLLM_CPU_OMP_THREADS_BIND": ("|" if tensor_parallel else ",").join(map(str, serving.cores)),
        "OMP_NUM_THREADS": str(len(serving.cores) // workers),
    }
    if not tensor_parallel:
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # for the executor "uni": no process between engine and model
    return ServerCommand("vllm", serving.checkpoint.name, port, argv, variables)
