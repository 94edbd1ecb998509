"""The few calls of CUDA's runtime library that torch offers no Python for: plain allocations and their IPC handles.

torch's own allocator cuts its tensors out of larger pieces and may map them piece by piece (expandable segments), which
cannot be passed to another process. A pool is one ``cudaMalloc`` instead, and torch never hears of it.
"""

from __future__ import annotations

import ctypes
import re
import weakref
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_void_p
from pathlib import Path

import torch

from services.core.errors import ConfigError

_PAGE_BYTES = 2 << 20
HANDLE_BYTES = 64  # cudaIpcMemHandle_t
_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
_LIBRARY = re.compile(r"\S*/libcudart[-.\w]*\.so[.\d]*$", re.MULTILINE)


class CudaError(Exception):
    """A call failed; the message is CUDA's own."""


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", c_ubyte * HANDLE_BYTES)]


class CudaMemory:
    """A piece of GPU memory that tensors can look at: ``torch.as_tensor`` of it is one, and keeps it alive."""

    def __init__(self, pointer: int, size: int) -> None:
        self.pointer = pointer
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 2,
        }


class CudaRuntime:
    """One GPU, by torch's own copy of the library, and so in torch's context.

    Args:
        index: of the GPU.

    Raises:
        ConfigError: torch has loaded no such library.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        torch.zeros(1, device=torch.device("cuda", index))  # makes the context, and loads the library
        self._library = _declared(ctypes.CDLL(loaded_library(Path("/proc/self/maps").read_text())))

    def allocate(self, size: int) -> CudaMemory:
        """Memory that is given back with the last tensor that looks at it.

        Raises:
            CudaError: there is not that much.
        """
        pointer = c_void_p()
        # CUDA puts what is smaller into one page with others, and its handle would be that of the page.
        self._call("cudaMalloc", byref(pointer), c_size_t(-(-size // _PAGE_BYTES) * _PAGE_BYTES))
        assert pointer.value is not None
        memory = CudaMemory(pointer.value, size)
        # At the process's end the driver does it.
        weakref.finalize(memory, self._free, pointer.value).atexit = False
        return memory

    def handle(self, memory: CudaMemory) -> bytes:
        """What another process opens the memory by; it must be ``allocate``'s."""
        handle = _Handle()
        self._call("cudaIpcGetMemHandle", byref(handle), c_void_p(memory.pointer))
        return bytes(handle.reserved)

    def open(self, handle: bytes, size: int) -> CudaMemory:
        """Another process's memory. ``close`` follows once nothing looks at it any more.

        Raises:
            CudaError: the process is gone, or its memory cannot be reached from here.
        """
        pointer = c_void_p()
        self._call("cudaIpcOpenMemHandle", byref(pointer), _Handle.from_buffer_copy(handle), c_uint(_LAZY_PEER_ACCESS))
        assert pointer.value is not None
        return CudaMemory(pointer.value, size)

    def close(self, pointer: int) -> None:
        """
        Raises:
            CudaError: it is closed already.
        """
        self._call("cudaIpcCloseMemHandle", c_void_p(pointer))

    def _free(self, pointer: int) -> None:
        self._call("cudaFree", c_void_p(pointer))

    def _call(self, name: str, *arguments: object) -> None:
        # Which GPU a call means is the calling thread's affair.
        for function, values in (("cudaSetDevice", (c_int(self._index),)), (name, arguments)):
            status = getattr(self._library, function)(*values)
            if status:
                self._library.cudaGetLastError()  # otherwise torch would find it behind its next kernel
                reason = self._library.cudaGetErrorString(status).decode()
                raise CudaError(f"{function}: {reason} ({status})")


def loaded_library(maps: str) -> str:
    """The path of the runtime library in a process's memory map (/proc/self/maps).

    Raises:
        ConfigError: there is none.
    """
    found = _LIBRARY.search(maps)
    if found is None:
        raise ConfigError(
            "torch has loaded no libcudart: pools in GPU memory need a torch that does not link it statically, as "
            "those on PyPI and download.pytorch.org"
        )
    return found[0]


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of what is called here."""
    types = {
        "cudaSetDevice": [c_int],
        "cudaMalloc": [POINTER(c_void_p), c_size_t],
        "cudaFree": [c_void_p],
        "cudaIpcGetMemHandle": [POINTER(_Handle), c_void_p],
        "cudaIpcOpenMemHandle": [POINTER(c_void_p), _Handle, c_uint],
        "cudaIpcCloseMemHandle": [c_void_p],
        "cudaGetLastError": [],
        "cudaGetErrorString": [c_int],
    }
    for name, arguments in types.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    library.cudaGetErrorString.restype = c_char_p
    return library
