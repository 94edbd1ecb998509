"""Shared memory that belongs to nobody's file system: memfds, allocated in full and sealed against shrinking.

A memfd disappears with its last mapping, so that nothing is left behind after SIGKILL. Two dangers of shared memory are
excluded at start: a page that cannot be had when it is first touched (SIGBUS or the OOM killer, instead of an error) by
allocating everything at once, and a file that a peer cuts short under our mapping (SIGBUS) by seals.

A mapping is never unmapped by hand: tensors and memoryviews keep the ``mmap`` object alive, and the last of them to go
unmaps it. ``torch.frombuffer`` makes that the only safe way: it holds a reference, but no buffer export that would make
``mmap.close`` fail.

What a core reads all the time should lie in huge pages. That takes memory that lies in them (``put_together``: of
shared memory hardly any system gives them by itself) and mappings that begin where they do (``map_aligned``).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from services.core.errors import ConfigError, PeerLostError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MIB = 1 << 20
_MADV_COLLAPSE = 25  # <linux/mman.h>, Linux 6.1; not in the mmap module
HUGE_PAGE_BYTES = 2 << 20

Memory = mmap.mmap | ctypes.Array[ctypes.c_char]  # whose buffer is a mapping that lasts as long as the object
MemoryT = TypeVar("MemoryT", bound=Memory)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value


def create_memfd(name: str, size: int) -> int:
    """Creates ``size`` bytes of zeros and answers the file descriptor, which the caller owns.

    Raises:
        ConfigError: there is not that much memory.
    """
    available = available_bytes()
    if size > available:
        raise ConfigError(_too_large(name, size, available))
    try:
        return _allocate(name, size, 0)
    except OSError as error:
        raise ConfigError(f"{_too_large(name, size, available)} ({error.strerror})") from error


def create_huge_memfd(name: str, size: int) -> int:
    """The same of huge pages that the system keeps for those who ask for them (hugetlb).

    Raises:
        ConfigError: there are not that many, or ``size`` is no multiple of 2 MiB.
    """
    if size % HUGE_PAGE_BYTES:
        raise ConfigError(f"huge pages have 2 MiB, and {name} should have {size / _MIB:g} MiB: ask for a multiple")
    try:
        return _allocate(name, size, os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    except OSError as error:
        raise ConfigError(
            f"cannot allocate {size // HUGE_PAGE_BYTES} huge pages of 2 MiB for {name} ({error.strerror}); "
            f"{_meminfo('HugePages_Free')} are free: reserve more (sysctl vm.nr_hugepages; limits of hugepages-2Mi in "
            "Kubernetes), or do without (huge_pages: false)"
        ) from error


def _allocate(name: str, size: int, flags: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


def map_memfd(fd: int, size: int) -> mmap.mmap:
    """Maps the first ``size`` bytes, shared and writable. The caller keeps ``fd`` and may close it."""
    return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def map_aligned(fd: int, size: int) -> Memory:
    """As ``map_memfd``, at an address where huge pages may begin; Python's own mmap lets nobody choose one.

    Raises:
        OSError: it cannot be mapped.
    """
    if size < HUGE_PAGE_BYTES:
        return map_memfd(fd, size)
    reserved_bytes = size + HUGE_PAGE_BYTES
    reserved = _map(None, reserved_bytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    try:
        address = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        _map(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd)
    except OSError:
        _libc.munmap(reserved, reserved_bytes)
        raise
    memory = (ctypes.c_char * size).from_address(address)
    # Not at the interpreter's end: threads that read the memory end with the process.
    weakref.finalize(memory, _libc.munmap, reserved, reserved_bytes).atexit = False
    return memory


def _map(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    mapped = _libc.mmap(address, size, protection, flags, fd, 0)
    if mapped is None or mapped == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(mapped)


def put_together(memory: Memory) -> None:
    """Asks the system to move the memory into huge pages, one by one, for every process that maps it.

    It may be used meanwhile. Takes a tenth of a second of a core for each GiB, or seconds where the system has to make
    room; ends early where it does not do so or has none left.
    """
    if isinstance(memory, mmap.mmap):
        return
    address = ctypes.addressof(memory)
    for at in range(address, address + len(memory) - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES):
        if _libc.madvise(at, HUGE_PAGE_BYTES, _MADV_COLLAPSE) != 0 and ctypes.get_errno() not in (
            errno.EAGAIN,
            errno.EBUSY,
        ):
            return


def map_foreign_memfd(fd: int, size: int, map_it: Callable[[int, int], MemoryT]) -> MemoryT:
    """Maps a memfd that another process has made, after checking that touching it is safe.

    Args:
        map_it: ``map_memfd`` or ``map_aligned``.

    Raises:
        PeerLostError: it is not a sealed, fully allocated memfd of exactly ``size`` bytes.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        status = os.fstat(fd)
        if seals & _SEALS != _SEALS or status.st_size != size or status.st_blocks * 512 < size:
            raise PeerLostError(
                f"the peer's shared memory is not a sealed and allocated memfd of {size} bytes "
                f"(seals {seals:#x}, {status.st_size} bytes, {status.st_blocks * 512} allocated)"
            )
        return map_it(fd, size)
    except (OSError, ValueError, OverflowError) as error:
        raise PeerLostError(f"the peer's shared memory cannot be mapped: {error}") from error


def available_bytes() -> int:
    """Memory this process can still take: the machine's, and that of every cgroup (version 2) above the process.

    Raises:
        ConfigError: the system does not tell.
    """
    available = 1024 * _meminfo("MemAvailable")
    root = Path("/sys/fs/cgroup")
    group = root / _own_cgroup().lstrip("/")
    for directory in (group, *group.parents):
        if not directory.is_relative_to(root):
            break
        try:
            limit = (directory / "memory.max").read_text().strip()
            used = int((directory / "memory.current").read_text())
            statistics = (directory / "memory.stat").read_text().split()
        except OSError:
            continue
        if limit != "max":
            # File pages that are not in use are given up before anything fails.
            reclaimable = int(statistics[statistics.index("inactive_file") + 1])
            available = min(available, max(0, int(limit) - used + reclaimable))
    return available


def _meminfo(name: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError as error:  # for want of a file descriptor
        raise ConfigError(f"cannot tell how much memory is available: /proc/meminfo: {error.strerror}") from error
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise ConfigError(f"/proc/meminfo names no {name}: this Linux kernel is older than 3.14 or was built without it")


def _own_cgroup() -> str:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ""
    return next((line[3:] for line in lines if line.startswith("0::")), "")


def _too_large(name: str, size: int, available: int) -> str:
    return (
        f"cannot allocate {size} bytes ({size / _MIB:.1f} MiB) for {name}: {available / _MIB:.1f} MiB of memory are "
        "available; ask for less or give this process more memory"
    )
