"""The C interface of ``src/layer_ops.h`` for ctypes: the same structures, in the same order."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import ClassVar

from kernels.cpu.library import AttentionCall, StoreCall, load_library


class NormCall(Structure):
    _fields_: ClassVar = [
        ("x", c_void_p),
        ("delta", c_void_p),
        ("weight", c_void_p),
        ("residual", c_void_p),
        ("sum", c_void_p),
        ("out", c_void_p),
        ("rows", c_int64),
        ("dim", c_int32),
        ("dtype", c_int32),
        ("eps", c_float),
        ("offset", c_float),
        ("scale", c_float),
    ]


class HeadsCall(Structure):
    _fields_: ClassVar = [
        ("x", c_void_p),
        ("weight", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("stride", c_int64),
        ("rows", c_int64),
        ("heads", c_int32),
        ("head_dim", c_int32),
        ("rotary_dim", c_int32),
        ("rotation", c_int32),
        ("dtype", c_int32),
        ("eps", c_float),
        ("offset", c_float),
    ]


class GateCall(Structure):
    _fields_: ClassVar = [
        ("gate", c_void_p),
        ("up", c_void_p),
        ("out", c_void_p),
        ("stride", c_int64),
        ("rows", c_int64),
        ("dim", c_int32),
        ("activation", c_int32),
        ("dtype", c_int32),
    ]


class ProductCall(Structure):
    _fields_: ClassVar = [
        ("x", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("residual", c_void_p),
        ("out", c_void_p),
        ("rows", c_int64),
        ("in_features", c_int32),
        ("columns", c_int32),
        ("dtype", c_int32),
        ("activation", c_int32),
        ("scale", c_float),
    ]


class UnpackCall(Structure):
    _fields_: ClassVar = [
        ("weight", c_void_p),
        ("indices", c_void_p),
        ("out", c_void_p),
        ("rows", c_int64),
        ("in_features", c_int32),
        ("columns", c_int32),
        ("dtype", c_int32),
    ]


class ChoiceCall(Structure):
    _fields_: ClassVar = [
        ("logits", c_void_p),
        ("scale", c_void_p),
        ("uniform", c_void_p),
        ("tokens", c_void_p),
        ("rows", c_int64),
        ("dim", c_int64),
        ("dtype", c_int32),
    ]


class NormWeights(Structure):
    _fields_: ClassVar = [("weight", c_void_p), ("eps", c_float), ("offset", c_float)]


class ProductWeights(Structure):
    _fields_: ClassVar = [("weight", c_void_p), ("bias", c_void_p)]


class DecoderLayer(Structure):
    _fields_: ClassVar = [
        ("before_attention", NormWeights),
        ("behind_attention", NormWeights),
        ("before_mlp", NormWeights),
        ("behind_mlp", NormWeights),
        ("qkv", ProductWeights),
        ("output", ProductWeights),
        ("gate_up", ProductWeights),
        ("down", ProductWeights),
        ("heads", HeadsCall),
        ("hidden", c_int32),
        ("qkv_columns", c_int32),
        ("attended", c_int32),
        ("inner", c_int32),
        ("activation", c_int32),
        ("dtype", c_int32),
        ("multiplier", c_float),
    ]


class StackedLayerView(Structure):
    _fields_: ClassVar = [
        ("layer", POINTER(DecoderLayer)),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("offset", c_int64),
        ("number", c_int32),
        ("rotary_dim", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("leaves_attention", c_int32),
    ]


class StackCall(Structure):
    _fields_: ClassVar = [
        ("layers", POINTER(StackedLayerView)),
        ("x", c_void_p),
        ("y", c_void_p),
        ("qkv", c_void_p),
        ("attended", c_void_p),
        ("merged", c_void_p),
        ("lse", c_void_p),
        ("asked", c_void_p),
        ("attention", AttentionCall),
        ("store", StoreCall),
        ("attention_ns", c_int64),
        ("local_ns", c_int64),
        ("asking_ns", c_int64),
        ("count", c_int32),
        ("at", c_int32),
        ("has_left", c_int32),
        ("asked_count", c_int32),
        ("may_ask", c_int32),
        ("sent", c_int32),
        ("taken", c_int32),
        ("has_local", c_int32),
    ]


@cache
def load_layer_library() -> ctypes.CDLL:
    """The kernels' library with the prototypes of the layer operations."""
    library = load_library()
    library.layer_ops_open.argtypes = [c_int32]
    library.layer_ops_open.restype = c_void_p
    library.layer_ops_close.argtypes = [c_void_p]
    library.layer_ops_close.restype = None
    library.layer_ops_columns.argtypes = [c_void_p, c_int32]
    library.layer_ops_columns.restype = c_int32
    for function, call, result in (
        (library.layer_ops_norm, NormCall, None),
        (library.layer_ops_heads, HeadsCall, None),
        (library.layer_ops_gate, GateCall, None),
        (library.layer_ops_product, ProductCall, c_int32),
        (library.layer_ops_unpack, UnpackCall, c_int32),
    ):
        function.argtypes = [c_void_p, POINTER(call)]
        function.restype = result
    library.choose_tokens.argtypes = [POINTER(ChoiceCall)]
    library.choose_tokens.restype = None
    layer = POINTER(DecoderLayer)
    library.layer_ops_begin.argtypes = [c_void_p, layer, c_int64, c_void_p, c_void_p, c_void_p, c_int32, c_void_p]
    library.layer_ops_begin.restype = c_int32
    library.layer_ops_finish.argtypes = [c_void_p, layer, c_int64, c_void_p, c_void_p, c_void_p]
    library.layer_ops_finish.restype = c_int32
    library.layer_ops_stack.argtypes = [c_void_p, c_void_p, POINTER(StackCall)]
    library.layer_ops_stack.restype = c_int32
    return library
