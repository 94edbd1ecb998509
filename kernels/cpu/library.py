"""The C interface of ``src/abi.h`` for ctypes: the same structures, in the same order."""

from __future__ import annotations

import ctypes
import sysconfig
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATUS_MESSAGES = {
    1: "no memory for scratch space",
    2: "plan.query_start must ascend and end at most at the number of rows of q",
    3: "plan.block_start must ascend and end at most at the number of listed blocks",
    4: "plan.block_ids names a block that the pool does not have",
    5: "an index is outside its tensor",
}


class PoolView(Structure):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("num_blocks", c_int64),
        ("block_stride", c_int64),
        ("layer_offset", c_int64),
        ("kv_heads", c_int32),
        ("block_tokens", c_int32),
        ("head_dim", c_int32),
        ("dtype", c_int32),
    ]


class AttentionCall(Structure):
    _fields_: ClassVar = [
        ("pool", PoolView),
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("query_start", c_void_p),
        ("query_pos", c_void_p),
        ("block_start", c_void_p),
        ("block_ids", c_void_p),
        ("block_pos", c_void_p),
        ("rows", c_int64),
        ("num_listed_blocks", c_int64),
        ("segments", c_int32),
        ("q_heads", c_int32),
        ("window", c_int32),
        ("out_dtype", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
    ]


class MergeCall(Structure):
    _fields_: ClassVar = [
        ("out", c_void_p),
        ("lse", c_void_p),
        ("part_out", c_void_p),
        ("part_lse", c_void_p),
        ("rows", c_void_p),
        ("out_rows", c_int64),
        ("count", c_int64),
        ("heads", c_int32),
        ("head_dim", c_int32),
        ("part_dtype", c_int32),
    ]


class StoreCall(Structure):
    _fields_: ClassVar = [
        ("pool", PoolView),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_stride", c_int64),
        ("v_stride", c_int64),
        ("slots", c_void_p),
        ("rows", c_int64),
        ("dtype", c_int32),
    ]


class ReadCall(Structure):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("ids", c_void_p),
        ("count", c_int64),
        ("stride_bytes", c_int64),
        ("run_bytes", c_int64),
    ]


class RingView(Structure):
    _fields_: ClassVar = [
        ("counters", c_void_p),
        ("data", c_void_p),
        ("capacity", c_uint64),
        ("head", c_uint64),
        ("tail", c_uint64),
        ("at", c_uint64),
    ]


class StreamView(Structure):
    _fields_: ClassVar = [
        ("in_", c_void_p),
        ("out", c_void_p),
        ("capacity", c_uint64),
        ("at", c_uint64),
        ("filled", c_uint64),
        ("freed", c_uint64),
        ("reported", c_uint64),
        ("sent", c_uint64),
        ("freed_by_peer", c_uint64),
        ("most_outstanding", c_uint64),
        ("unsent_at", c_uint64),
        ("unsent", c_uint64),
    ]


class EmulatedLinkState(Structure):
    _fields_: ClassVar = [("bytes_per_s", c_double), ("latency_s", c_double), ("free_at", c_double)]


class Channel(Structure):
    _fields_: ClassVar = [
        ("in_", RingView),
        ("out", RingView),
        ("stream", StreamView),
        ("link", c_void_p),
        ("left_at", c_double),
        ("max_message", c_uint64),
        ("fd", c_int32),
        ("is_stream", c_int32),
    ]


class Answering(Structure):
    _fields_: ClassVar = [
        ("channel", Channel),
        ("kernels", c_void_p),
        ("attention", AttentionCall),
        ("step", c_uint64),
        ("layers", c_int64),
        ("layer_stride", c_int64),
        ("ended", c_void_p),
        ("ended_before", c_uint64),
        ("answered", c_int64),
        ("computed_ns", c_int64),
        ("received_bytes", c_int64),
        ("sent_bytes", c_int64),
        ("answered_at_ns", c_int64),
    ]


class AskingSums(Structure):
    _fields_: ClassVar = [
        ("asks", c_int64),
        ("answers", c_int64),
        ("lates", c_int64),
        ("sent_bytes", c_int64),
        ("received_bytes", c_int64),
        ("answers_ns", c_int64),
        ("merges_ns", c_int64),
        ("waits_ns", c_int64),
        ("answered", c_uint64),
    ]


class Asking(Structure):
    _fields_: ClassVar = [
        ("channel", Channel),
        ("kernels", c_void_p),
        ("rows", c_void_p),
        ("count", c_int64),
        ("batch_rows", c_int64),
        ("step", c_uint64),
        ("q_heads", c_int32),
        ("head_dim", c_int32),
        ("dtype", c_int32),
        ("out_dtype", c_int32),
        ("layer", c_int32),
        ("unused", c_int32),
        ("sequence", c_uint64),
        ("q", c_void_p),
        ("q_stride_bytes", c_uint64),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("spin_ns", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int32),
        ("late", c_int32),
        ("taken_at_ns", c_int64),
        ("merged_ns", c_int64),
        ("query_bytes", c_int64),
        ("answer_bytes", c_int64),
        ("distance", c_int64),
        ("sent_at_ns", c_int64),
        ("sums", AskingSums),
        ("ending", c_int32),
        ("unused_too", c_int32),
    ]


class WatchCall(Structure):
    _fields_: ClassVar = [
        ("counters", c_void_p),
        ("seen", c_void_p),
        ("answering", c_void_p),
        ("spin_ns", c_int64),
        ("count", c_int32),
        ("fd", c_int32),
    ]


@cache
def find_library() -> Path | None:
    """The built library beside this file, or None where it was not built for this Python."""
    path = Path(__file__).with_name("_native" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))
    return path if path.exists() else None


@cache
def load_library() -> ctypes.CDLL:
    """The library with its prototypes; loaded once, it has no state of its own."""
    path = find_library()
    if path is None:
        raise FileNotFoundError(
            "the compiled CPU kernels are missing; run `python setup.py build_ext --inplace` or `pip install -e .`"
        )
    library = ctypes.CDLL(str(path))
    library.kernels_open.argtypes = [c_int32]
    library.kernels_open.restype = c_void_p
    library.kernels_close.argtypes = [c_void_p]
    library.kernels_close.restype = None
    library.kernels_isa.argtypes = [c_void_p]
    library.kernels_isa.restype = c_char_p
    library.kernels_micro_attention.argtypes = [c_void_p, POINTER(AttentionCall)]
    library.kernels_micro_attention.restype = c_int32
    library.kernels_merge_partials.argtypes = [c_void_p, POINTER(MergeCall)]
    library.kernels_merge_partials.restype = c_int32
    library.kernels_store_kv.argtypes = [c_void_p, POINTER(StoreCall)]
    library.kernels_store_kv.restype = c_int32
    library.kernels_read.argtypes = [c_void_p, POINTER(ReadCall)]
    library.kernels_read.restype = c_uint32
    library.watch_connections.argtypes = [POINTER(WatchCall)]
    library.watch_connections.restype = c_int32
    for function in (library.ask, library.take_answer):
        function.argtypes = [POINTER(Asking)]
        function.restype = c_int32
    return library


def check_status(status: int) -> None:
    if status == 1:
        raise MemoryError(STATUS_MESSAGES[status])
    if status != 0:
        raise ValueError(STATUS_MESSAGES[status])
