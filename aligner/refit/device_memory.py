"""Memory of a GPU that another process owns, by CUDA's own handles: 64 bytes and an offset, of no version of torch.

Calls the driver, which every machine with a GPU has. Source: CUDA driver API, cuIpcGetMemHandle, cuIpcOpenMemHandle.
"""

import ctypes
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

LIBRARY = "libcuda.so.1"
HANDLE_BYTES, LAZY_PEER_ACCESS = 64, 1


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * HANDLE_BYTES)]


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL(LIBRARY)
    driver.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), _Handle, ctypes.c_uint]
    driver.cuIpcCloseMemHandle.argtypes = [ctypes.c_uint64]
    return driver


def handle_of(tensor: Tensor) -> tuple[bytes, int, int]:
    """(handle, where the tensor begins, bytes) of the allocation that a tensor lies in; begin in bytes.

    Raises ValueError for memory that CUDA cannot share.
    """
    pointer, base, size, handle = ctypes.c_uint64(tensor.data_ptr()), ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    code = _driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), pointer)
    code = code or _driver().cuIpcGetMemHandle(ctypes.byref(handle), base)
    if code:
        raise ValueError(
            f"refit: the trainer's memory cannot be shared with the engine (CUDA error {code}); take "
            "expandable_segments:True out of PYTORCH_CUDA_ALLOC_CONF, whose memory has no handles."
        )
    return ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES), pointer.value - base.value, size.value


def open_handle(handle: bytes, size: int, device: torch.device) -> tuple[Tensor, Callable[[], None]]:
    """(all bytes of another process's allocation, (size,) uint8, as memory that `device` reads; what closes it).

    Raises ValueError where it cannot be opened.
    """
    pointer = ctypes.c_uint64()
    given = _Handle.from_buffer_copy(handle)
    code = _driver().cuIpcOpenMemHandle_v2(ctypes.byref(pointer), given, LAZY_PEER_ACCESS)
    if code:
        raise ValueError(
            f"refit: the engine cannot open the trainer's memory (CUDA error {code}); both must be on one machine, on "
            "GPUs that reach each other, and see /dev/shm and each other's processes."
        )
    return _Memory(pointer.value, size).tensor(device), partial(_driver().cuIpcCloseMemHandle, pointer.value)


class _Memory:
    """Bytes at an address, as torch takes them."""

    def __init__(self, pointer: int, size: int):
        self._pointer, self._size = pointer, size
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 3}

    def tensor(self, device: torch.device) -> Tensor:
        if device.type == "cuda":
            tensor = torch.as_tensor(self, device=device)
            if tensor.data_ptr() != self._pointer:  # it would go stale
                raise RuntimeError(
                    f"refit: torch has copied memory of another GPU to {device} instead of reading it there"
                )
            return tensor
        return torch.frombuffer((ctypes.c_uint8 * self._size).from_address(self._pointer), dtype=torch.uint8)
