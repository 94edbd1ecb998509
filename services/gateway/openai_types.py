"""Requests of OpenAI's API, validated: what all of them have in common, and ``POST /v1/completions``.

What is asked for is done, or refused by name: a field that this server does not implement is accepted only at the value
that means "not asked for". Strict types (no "5" for 5), finite numbers, bounds that the internal types can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from services.core.shaping import MOST_BIASED, LogitShaping
from services.core.structure import Structure
from services.gateway.openai_errors import ApiError
from services.gateway.requests import MAX_STOP_CHARACTERS, MAX_STOPS, Sampling
from services.gateway.structured_types import ResponseFormat, StructuredOutputs, structure_of

MAX_LOGPROBS = 20
MAX_TOKEN_ID = 2**32 - 1
MAX_STOP_TOKENS = 128
MAX_N = 128

# Validation stops at the first wrong one: a list may be millions long.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenIdText = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")]
Texts = Annotated[list[str], Field(fail_fast=True)]

# Fields of OpenAI's API, and of servers that extend it, that change the answer and are not implemented; with the values
# that ask for nothing. null is always one of them.
Neutral = Mapping[str, tuple[object, ...]]
_NEUTRAL: Neutral = {
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
}
# Fields that do not change the answer.
_IGNORED = frozenset({"user", "metadata", "request_id", "store", "service_tier", "priority"})


class StreamOptions(BaseModel):
    """``include_usage``: a last chunk tells the tokens used. Chunks have no obfuscation padding."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingRequest(BaseModel):
    """What all bodies that ask for a generation have in common."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    neutral: ClassVar[Neutral] = _NEUTRAL

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    # OpenAI's seeds are signed, the project's unsigned: both are taken.
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    # OpenAI's keys are token ids as texts: JSON has no other keys.
    logit_bias: (
        Annotated[dict[TokenIdText, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASED)] | None
    ) = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKENS)] | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def asks_for_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, default_tokens: int, logprobs: int | None) -> Sampling:
        """
        Args:
            default_tokens: generated at most where the request does not say.
            logprobs: of how many of the most probable tokens; None: of none.

        Raises: ApiError, InvalidRequestError.
        """
        return Sampling(
            max_tokens=default_tokens if self.max_tokens is None else self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            seed=None if self.seed is None else self.seed % 2**64,
            ignore_eos=bool(self.ignore_eos),
            # 0 asks for the drawn token's probability alone, which comes with one or more others only.
            logprobs=0 if logprobs is None else max(1, logprobs),
            shaping=self.shaping(),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            include_stop=bool(self.include_stop_str_in_output),
            structure=self.structure(),
        )

    def structure(self) -> Structure | None:
        """What the answer must look like. Raises ApiError, InvalidRequestError."""
        return structure_of(self.response_format, self.structured_outputs)

    def shaping(self) -> LogitShaping:
        return LogitShaping(
            logit_bias=tuple(sorted((int(token), bias) for token, bias in (self.logit_bias or {}).items())),
            min_tokens=self.min_tokens or 0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            top_k=max(0, self.top_k or 0),  # -1, too, means all
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
        )


Body = TypeVar("Body", bound=BaseModel)
Asked = TypeVar("Asked", bound=SamplingRequest)


class CompletionRequest(SamplingRequest):
    """The body of a completion request."""

    neutral: ClassVar[Neutral] = {
        **_NEUTRAL,
        "best_of": (1,),
        "suffix": ("",),
        "add_special_tokens": (True,),
    }

    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    def sampling(self, default_tokens: int, logprobs: int | None) -> Sampling:
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens: must be at least 1; 0 is for echo alone", "max_tokens")
        sampling = super().sampling(default_tokens, logprobs)
        return replace(sampling, prompt_logprobs=sampling.logprobs) if self.echo else sampling

    def the_prompt(self) -> str | list[int]:
        """The one prompt. Raises ApiError for several."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        if not prompt:
            raise ApiError(400, "prompt: must not be empty", "prompt")
        if isinstance(prompt[0], int):
            return prompt
        if len(prompt) > 1:
            raise ApiError(400, "prompt: one prompt a request, please; send several requests instead", "prompt")
        return prompt[0]


def parse_body(kind: type[Body], body: bytes) -> Body:
    """Raises ApiError 400, naming the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as exc:
        raise _refusal(exc.errors(include_url=False, include_context=False)) from None


def parse_request(kind: type[Asked], body: bytes) -> Asked:
    """Raises ApiError 400, naming the field: also for what is not implemented."""
    request = parse_body(kind, body)
    for name, value in (request.model_extra or {}).items():
        _check_extra(name, value, kind.neutral)
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: only with stream: true", "stream_options")
    return request


def _check_extra(name: str, value: Any, known: Neutral) -> None:
    if value is None or name in _IGNORED:
        return
    if name not in known:
        raise ApiError(400, f"unknown field {name!r}", name, "unknown_field")
    # 1 == True in Python, not here.
    if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in known[name]):
        raise ApiError(400, f"{name}: this server does not support it; leave it out", name, "unsupported_field")


def _refusal(errors: list[ErrorDetails]) -> ApiError:
    """The first thing that was wrong, in words. Values are not repeated: a prompt may be long or private."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    if not first["loc"]:
        return ApiError(400, "the body must be a JSON object")
    param = str(first["loc"][0])
    if param == "prompt" and first["type"] != "missing":
        # Of the prompt's alternatives, the one that got farthest tells what was wrong.
        first = max(errors, key=lambda error: len(error["loc"]))
        if len(first["loc"]) < 3:
            return ApiError(400, "prompt: must be a string or a list of token ids", param)
        where = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
        return ApiError(400, f"prompt{where}: {first['msg']}", param)
    name = ".".join(str(part) for part in first["loc"])
    return ApiError(400, f"{name}: {first['msg']}", param)
