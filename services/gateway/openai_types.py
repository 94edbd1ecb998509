"""The request of OpenAI's ``POST /v1/completions``, validated.

What is asked for is done, or refused by name: a field that this server does not implement is accepted only at the value
that means "not asked for". Strict types (no "5" for 5), finite numbers, bounds that the internal types can hold.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from services.core.shaping import MOST_BIASED, LogitShaping
from services.gateway.openai_errors import ApiError
from services.gateway.requests import MAX_STOP_CHARACTERS, MAX_STOPS, Sampling

MAX_LOGPROBS = 20
MAX_TOKEN_ID = 2**32 - 1
MAX_STOP_TOKENS = 128

# Validation stops at the first wrong one: a list may be millions long.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenIdText = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")]
Texts = Annotated[list[str], Field(fail_fast=True)]

# Fields of OpenAI's API, and of servers that extend it, that change the answer and are not implemented; with the values
# that ask for nothing. null is always one of them.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "length_penalty": (1,),
    "n": (1,),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "use_beam_search": (False,),
    "add_special_tokens": (True,),
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


class CompletionRequest(BaseModel):
    """The body of a completion request."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    # OpenAI's seeds are signed, the project's unsigned: both are taken.
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
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

    def sampling(self) -> Sampling:
        return Sampling(
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            seed=None if self.seed is None else self.seed % 2**64,
            ignore_eos=bool(self.ignore_eos),
            # 0 asks for the drawn token's probability alone, which comes with one or more others only.
            logprobs=0 if self.logprobs is None else max(1, self.logprobs),
            shaping=self.shaping(),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            include_stop=bool(self.include_stop_str_in_output),
        )

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


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Raises ApiError 400, naming the field."""
    try:
        request = CompletionRequest.model_validate_json(body)
    except ValidationError as exc:
        raise _refusal(exc.errors(include_url=False, include_context=False)) from None
    for name, value in (request.model_extra or {}).items():
        _check_extra(name, value)
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: only with stream: true", "stream_options")
    return request


def _check_extra(name: str, value: Any) -> None:
    if value is None or name in _IGNORED:
        return
    if name not in _NEUTRAL:
        raise ApiError(400, f"unknown field {name!r}", name, "unknown_field")
    # 1 == True in Python, not here.
    if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[name]):
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
