"""What Redis keeps of a request, and the scripts that change it.

A record is owned by one gateway at a time. ``takeovers`` counts how often it went to another one: it is the fencing
token of whoever writes. A script of an earlier owner changes nothing and answers TAKEN_OVER.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import TypeAdapter

from services.gateway.position import pack_ids, unpack_ids
from services.gateway.requests import GenerationRequest

TAKEN_OVER = 0
# KEYS: the record (a hash), its tokens (a string). ARGV of all but TAKE_OVER: takeovers, time to live in seconds, ...
_FENCE = """
local owner = redis.call('HGET', KEYS[1], 'takeovers')
if owner and owner ~= ARGV[1] then return 0 end
"""
_KEEP = """
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
return 1
"""
# ... then fields and values in turn.
WRITE_STARTED = _FENCE + "redis.call('HSET', KEYS[1], 'takeovers', ARGV[1], unpack(ARGV, 3))" + _KEEP
# ... offset in bytes, ids. A record that Redis has lost stays lost, and tokens behind a gap are left out: the string is
# the answer's beginning, always.
WRITE_TOKENS = (
    _FENCE
    + """
if not owner or redis.call('STRLEN', KEYS[2]) < tonumber(ARGV[3]) then return 1 end
redis.call('SETRANGE', KEYS[2], ARGV[3], ARGV[4])
if ARGV[2] == '0' then return 1 end
"""
    + _KEEP
)
# ... state.
WRITE_ENDED = _FENCE + "redis.call('HSET', KEYS[1], 'state', ARGV[3])" + _KEEP
# ARGV: the new owner, time to live in seconds, name of the API key that the record must belong to; then, of a request
# that may not have begun, the fields and values that it begins with. Answers the hash and the tokens, or nothing.
TAKE_OVER = """
local hash = KEYS[1]
if redis.call('HEXISTS', hash, 'takeovers') == 0 then
  if #ARGV == 3 then return false end
  redis.call('HSET', hash, 'takeovers', 0, unpack(ARGV, 4))
end
if redis.call('HGET', hash, 'key_name') ~= ARGV[3] then return false end
redis.call('HINCRBY', hash, 'takeovers', 1)
redis.call('HSET', hash, 'owner', ARGV[1], 'state', 'running')
redis.call('EXPIRE', hash, ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
return {redis.call('HGETALL', hash), redis.call('GET', KEYS[2]) or ''}
"""

_REQUEST = TypeAdapter(GenerationRequest)
# Fields of their own in the hash, or its key.
_APART = frozenset({"prompt_ids", "request_id", "takeovers", "key_name"})


class JournalRecord(NamedTuple):
    """A request that goes on here, and the beginning of its answer."""

    request: GenerationRequest
    generated: Sequence[int]


def fields_of(request: GenerationRequest, owner: str) -> dict[str, str | bytes]:
    """The hash of a request that begins. ``owner`` is the gateway's id, for people."""
    return {
        "prompt": pack_ids(request.prompt_ids),
        "parameters": _REQUEST.dump_json(request, exclude=set(_APART)),
        "key_name": request.key_name,
        "owner": owner,
        "state": "running",
    }


def record_of(request_id: str, fields: Mapping[bytes, bytes], tokens: bytes) -> JournalRecord:
    """The other way round, after a take-over."""
    apart = {
        "prompt_ids": (),
        "request_id": request_id,
        "takeovers": int(fields[b"takeovers"]),
        "key_name": fields[b"key_name"].decode(),
    }
    request = _REQUEST.validate_python({**json.loads(fields[b"parameters"]), **apart})
    # Not checked id by id: a prompt may have millions.
    return JournalRecord(dataclasses.replace(request, prompt_ids=unpack_ids(fields[b"prompt"])), unpack_ids(tokens))
