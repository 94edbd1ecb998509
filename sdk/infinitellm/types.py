"""What calls take and answer: typed dictionaries and frozen dataclasses, no protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

FinishReason = Literal["stop", "length"]
Prompt = str | Sequence[int]


class SamplingOptions(TypedDict, total=False):
    """What may be done to the model's distribution before a token is drawn. Left out means: nothing.

    Attributes:
        top_k: draw from the k most probable tokens only.
        top_p: draw from the most probable tokens that together reach this probability only; above 0, at most 1.
        min_p: draw from tokens at least so probable, relative to the most probable one, only; between 0 and 1.
        repetition_penalty: logits of tokens in prompt or answer are divided by it where positive, multiplied where
            negative; above 0.
        presence_penalty: taken from the logits of tokens in the answer; between -2 and 2.
        frequency_penalty: likewise, once for each time.
        logit_bias: added to the logits of these token ids; between -100 and 100.
        min_tokens: do not end before the answer has so many tokens.
        stop_token_ids: further tokens that end the answer; the one drawn is its last.
        stop: texts that end the answer where it contains one of them.
        include_stop_str_in_output: the text goes on to the end of the stop text, in place of ending before it.
        json_schema: a JSON schema, as a text, that the answer must fit; of this and the next two, at most one.
        regex: a regular expression that it must match as a whole.
        grammar: a grammar that it must follow, in the Lark dialect of llguidance or in GBNF.
    """

    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    min_tokens: int
    stop_token_ids: Sequence[int]
    stop: Sequence[str]
    include_stop_str_in_output: bool
    json_schema: str
    regex: str
    grammar: str


class GenerationOptions(SamplingOptions, total=False):
    """Everything that ``Client.generate`` takes by name, ``max_tokens`` and ``progress`` aside; see there."""

    temperature: float
    seed: int | None
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    model: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the prompt has been computed."""

    request_id: str
    computed_tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position: of the token there, and of the most probable ones, descending."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of a part of the prompt: the parts follow one another, before the first tokens.

    Attributes:
        first: index in the prompt of the first token that this is about; 1 in the first part, as nothing predicts the
            first token.
    """

    request_id: str
    first: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens.

    Attributes:
        text: their text; a character that is not complete yet comes with a later event. Empty without a tokenizer.
        logprobs: one for each id if they were asked for, otherwise none.
    """

    request_id: str
    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event.

    Attributes:
        reason: ``stop`` after the end-of-sequence token, ``length`` after max_tokens.
        cached_tokens: prompt tokens whose KV was found in the cluster and not computed.
    """

    request_id: str
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


Event = Progress | PromptLogprobs | Tokens | Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer.

    Attributes:
        logprobs: one for each of ``token_ids`` if they were asked for, otherwise none.
        prompt_logprobs: one for each of the prompt's tokens but the first, if they were asked for, otherwise none.
        reason, prompt_tokens, cached_tokens: as in ``Finished``.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class PeerTransport:
    """How an instance reaches a KV daemon: "shm", "rdma", "tcp", ..."""

    kvdaemon_id: str
    transport: str


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """An engine that computes the model; ``address`` is its control server's host:port. ``transports`` are those to the
    KV daemons that it is connected to; its local daemon's pool it maps."""

    instance_id: str
    address: str
    local_kvdaemon_id: str
    running_requests: int
    waiting_requests: int
    heartbeat_age_s: float
    transports: tuple[PeerTransport, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolUse:
    """The use of one pool, in rBlocks: total = free + cached + workspace + reserved + in_use.

    Attributes:
        cached: sealed, without users; kept for prefix reuse, evicted when room is needed.
        workspace: held open by the local instance for the tails of its sequences.
        reserved: promised to a request, not written yet.
        in_use: sealed, with users.
    """

    total: int
    free: int
    cached: int
    workspace: int
    reserved: int
    in_use: int


@dataclass(frozen=True, slots=True)
class KvDaemonStatus:
    """One pool of rBlocks; ``block_bytes`` is 0 and ``use`` all 0 as long as no instance has opened a session."""

    kvdaemon_id: str
    address: str
    pool_bytes: int
    block_bytes: int
    use: PoolUse
    heartbeat_age_s: float


@dataclass(frozen=True, slots=True)
class BlockPlacement:
    """Some of a request's rBlocks on one daemon; ``local`` if the request's instance maps that daemon's pool."""

    kvdaemon_id: str
    num_blocks: int
    local: bool


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """A running request and where its rBlocks lie."""

    request_id: str
    instance_id: str
    placement: tuple[BlockPlacement, ...]


@dataclass(frozen=True, slots=True)
class GManagerStatus:
    """One gManager. None leads for a moment after the leader was lost, and while etcd is away."""

    gmanager_id: str
    address: str
    leads: bool


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The cluster as its gManager knows it; may be a heartbeat interval old."""

    instances: tuple[InstanceStatus, ...]
    kvdaemons: tuple[KvDaemonStatus, ...]
    requests: tuple[RequestStatus, ...]
    models: tuple[str, ...]
    gmanagers: tuple[GManagerStatus, ...]
