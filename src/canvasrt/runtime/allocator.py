"""Keeps freed memory in the process, so that the next step finds it mapped. Knows nothing of torch."""

import ctypes

# <malloc.h> of the GNU C library
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more; larger blocks are rare and worth a mapping of their own
_KEPT = 256 << 20  # bytes that a heap keeps free at most
_GROWTH = 16 << 20  # bytes that it grows by at least


def keep_freed_memory() -> bool:
    """For the whole process, as `mallopt` works. False where the C library has no such settings.

    By default glibc gives blocks of 128 KiB and more back to the system at once, and every page of the next one costs
    a page fault: a fifth of a denoising step of eight canvases on a virtual machine.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD, _TRIM_THRESHOLD: _KEPT, _TOP_PAD: _GROWTH}
    taken = [mallopt(name, value) for name, value in settings.items()]
    return all(taken)
