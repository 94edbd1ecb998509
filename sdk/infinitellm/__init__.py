"""Client of infinite-llm.

from infinitellm import Client, Tokens

with Client(["127.0.0.1:50051", "127.0.0.1:50052"]) as client:  # one address does as well
    for event in client.generate("Once upon a time", max_tokens=64):
        if isinstance(event, Tokens):
            print(event.text, end="", flush=True)
"""

from infinitellm.async_client import AsyncClient
from infinitellm.client import Client
from infinitellm.errors import InfiniteLLMError
from infinitellm.retry import RetryPolicy
from infinitellm.types import (
    BlockPlacement,
    ClusterStatus,
    Completion,
    Event,
    Finished,
    GenerationOptions,
    GManagerStatus,
    InstanceStatus,
    KvDaemonStatus,
    PeerTransport,
    PoolUse,
    Progress,
    PromptLogprobs,
    RequestStatus,
    SamplingOptions,
    TokenLogprobs,
    Tokens,
)

__all__ = [
    "AsyncClient",
    "BlockPlacement",
    "Client",
    "ClusterStatus",
    "Completion",
    "Event",
    "Finished",
    "GManagerStatus",
    "GenerationOptions",
    "InfiniteLLMError",
    "InstanceStatus",
    "KvDaemonStatus",
    "PeerTransport",
    "PoolUse",
    "Progress",
    "PromptLogprobs",
    "RequestStatus",
    "RetryPolicy",
    "SamplingOptions",
    "TokenLogprobs",
    "Tokens",
]
