"""Compiled kernels for CPUs: C++ with a C interface, one source a subject, called by ctypes.

``library()`` has a function for each ``KERNEL`` of the sources, and its arguments are checked as the source declares them: a
``float *`` takes a contiguous float32 tensor on the CPU, a ``void *`` one of any type, either of them None for a null pointer; an
``int64_t`` or a ``float`` takes a number. ctypes releases the GIL during a call.

A kernel is an implementation beside one in PyTorch or FBGEMM, which stays: it is what runs where nothing was compiled, and what
tests compare with. Whoever uses kernels asks ``available()`` and has a switch from the configuration (``kernels``).
"""

import ctypes
import functools
import re
from types import SimpleNamespace
from typing import Any

from trainer.kernels import build

_DECLARATION = re.compile(r"^KERNEL void (\w+)\(([^)]*)\)", re.MULTILINE)


def available() -> bool:
    """Whether `make setup` has compiled the kernels for this CPU."""
    return library() is not None


@functools.cache
def library() -> SimpleNamespace | None:
    path = build.find()
    if path is None:
        return None
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:  # made where the C library is newer, or on a mount without execution
        return None
    texts = [source.read_text() for source in build.sources()]
    declared = [declaration for text in texts for declaration in _DECLARATION.findall(text)]
    return SimpleNamespace(
        **{
            name: ctypes.CFUNCTYPE(None, *map(_argument, parameters.split(",")))((name, loaded))
            for name, parameters in declared
        }
    )


class _Pointer:
    """To the values of a tensor. An argument's type in ctypes is whatever has ``from_param``."""

    dtype: str | None = None

    @classmethod
    def from_param(cls, tensor: Any) -> ctypes.c_void_p:
        if tensor is None:
            return ctypes.c_void_p(None)
        assert tensor.device.type == "cpu" and tensor.is_contiguous(), (tensor.device, tensor.stride())
        assert cls.dtype in (None, str(tensor.dtype)), (cls.dtype, tensor.dtype)
        return ctypes.c_void_p(tensor.data_ptr())


class _Floats(_Pointer):
    dtype = "torch.float32"


class _Integers(_Pointer):
    dtype = "torch.int64"


_TYPES: dict[str, Any] = {
    "void *": _Pointer,
    "float *": _Floats,
    "int64_t *": _Integers,
    "int64_t ": ctypes.c_int64,
    "float ": ctypes.c_float,
}


def _argument(parameter: str) -> Any:
    """The type of ``const float *gradient``."""
    kind = re.sub(r"\s+", " ", parameter.strip()).removeprefix("const ")
    return _TYPES[re.sub(r"\w+$", "", kind)]
