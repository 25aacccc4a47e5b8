"""llama.cpp's own libraries, called through ctypes: the peer of the GGUF block formats.

They are taken from the folder that BITFOLD_LLAMA_CPP names (where libggml-base and libggml-cpu lie), else from
an installed llama_cpp package. Only what their public headers declare is used.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

VARIABLE = "BITFOLD_LLAMA_CPP"
# enum ggml_type: ids by the names in small letters, which the library is asked to confirm.
TYPES = {
    "f32": 0,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "q2_k": 10,
    "q3_k": 11,
    "q4_k": 12,
    "q5_k": 13,
    "q6_k": 14,
    "iq4_nl": 20,
    "iq4_xs": 23,
    "mxfp4": 39,
}
BLOCK_TYPES = tuple(name for name in TYPES if name != "f32")
MAX_THREADS = 512  # entries of a thread pool's mask, by ggml.h
OVERHEAD = 1 << 20  # bytes for the descriptions of a graph of a few tensors
SUFFIX = {"darwin": "dylib"}.get(sys.platform, "so")


class AbsentError(RuntimeError):
    """The libraries aren't here; the message says where they were looked for."""


class _Traits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("from_float_ref", c_void_p),
    )


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _ThreadpoolParams(ctypes.Structure):
    """struct ggml_threadpool_params."""

    _fields_ = (
        ("cpumask", c_bool * MAX_THREADS),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_ignore = _Log(lambda level, text, data: None)  # kept here: the library holds no reference


# name: (result, arguments). Of libggml-base, then of libggml-cpu.
_BASE: dict[str, tuple[object, tuple[object, ...]]] = {
    "ggml_type_name": (c_char_p, (c_int,)),
    "ggml_blck_size": (c_int64, (c_int,)),
    "ggml_type_size": (c_size_t, (c_int,)),
    "ggml_version": (c_char_p, ()),
    "ggml_commit": (c_char_p, ()),
    "ggml_log_set": (None, (_Log, c_void_p)),
    "ggml_quantize_init": (None, (c_int,)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    ),
    "ggml_get_type_traits": (POINTER(_Traits), (c_int,)),
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_threadpool_params_init": (None, (POINTER(_ThreadpoolParams), c_int)),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_buft_alloc_buffer": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buft_get_alloc_size": (c_size_t, (c_void_p, c_void_p)),
    "ggml_backend_buffer_get_base": (c_void_p, (c_void_p,)),
    "ggml_backend_buffer_set_usage": (None, (c_void_p, c_int)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_alloc": (c_int, (c_void_p, c_void_p, c_void_p)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_free": (None, (c_void_p,)),
}
_CPU: dict[str, tuple[object, tuple[object, ...]]] = {
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_set_threadpool": (None, (c_void_p, c_void_p)),
    "ggml_threadpool_new": (c_void_p, (POINTER(_ThreadpoolParams),)),
}
_USAGE_WEIGHTS = 1  # ggml_backend_buffer_usage


def _folders() -> Iterator[Path]:
    named = os.environ.get(VARIABLE)
    if named:
        yield Path(named)
        return  # who names a folder wants no other
    spec = importlib.util.find_spec("llama_cpp")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / "lib"


def absence() -> str | None:
    """Why the libraries can't take part, None where they can."""
    try:
        library()
    except AbsentError as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def library() -> Library:
    """The libraries, loaded once. Raises AbsentError."""
    folders = list(_folders())
    for folder in folders:
        base, cpu = (folder / f"libggml-{name}.{SUFFIX}" for name in ("base", "cpu"))
        if base.is_file() and cpu.is_file():
            return Library(base, cpu)
    if not folders:
        raise AbsentError(f"llama_cpp is not installed, and {VARIABLE} names no folder")
    raise AbsentError(f"no libggml-base.{SUFFIX} and libggml-cpu.{SUFFIX} in {folders[0]}")


class Library:
    """The functions of the two libraries, by name, and what encoding and decoding make of them."""

    def __init__(self, base: Path, cpu: Path) -> None:
        self.folder = base.parent
        self._backends: dict[int, int] = {}
        try:
            libraries = ((ctypes.CDLL(str(base)), _BASE), (ctypes.CDLL(str(cpu)), _CPU))
            self.call = {
                name: _function(found, name, *signature)
                for found, table in libraries
                for name, signature in table.items()
            }
        except (OSError, AttributeError) as error:
            raise AbsentError(f"the libraries in {base.parent} can't be used: {error}") from error
        self.call["ggml_log_set"](_ignore, None)  # it tells of every matrix that it repacks
        for name, id in TYPES.items():
            found_name = self.call["ggml_type_name"](id).decode().lower()
            if found_name != name:
                raise AbsentError(f"the libraries in {base.parent} call type {id} {found_name}, not {name}")

    @property
    def version(self) -> str:
        """ "0.25.3 (commit)"."""
        return f"{self.call['ggml_version']().decode()} ({self.call['ggml_commit']().decode()})"

    def row_bytes(self, type: str, k: int) -> int:
        """Bytes of a row of k values. Raises ValueError for a type that isn't in TYPES, or a k with part of a block."""
        if type not in TYPES:
            raise ValueError(f"type is {type!r}; it must be one of {', '.join(TYPES)}")
        block = self.call["ggml_blck_size"](TYPES[type])
        if k % block:
            raise ValueError(f"k is {k}; for {type} it must be a multiple of {block}")
        return k // block * self.call["ggml_type_size"](TYPES[type])

    def quantize(
        self, weight: Tensor, type: str, importance: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """A contiguous float32 [n, k] as blocks, uint8 [n, bytes of a row], in one thread.

        importance: float32 [k]; out: where they go, fresh memory without it.
        """
        n, k = weight.shape
        assert weight.dtype == torch.float32
        assert weight.is_contiguous()
        out = torch.empty(n, self.row_bytes(type, k), dtype=torch.uint8) if out is None else out
        pointer = None
        if importance is not None:
            assert importance.dtype == torch.float32
            assert importance.shape == (k,)
            pointer = importance.data_ptr()
        written = self.call["ggml_quantize_chunk"](
            TYPES[type], weight.data_ptr(), out.data_ptr(), 0, n, k, pointer
        )
        if written != out.nbytes:
            raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes; {out.nbytes} were expected")
        return out

    def dequantize(self, blocks: Tensor, type: str, k: int, out: Tensor | None = None) -> Tensor:
        """Blocks, uint8 [n, bytes of a row], as float32 [n, k], in one thread."""
        n = blocks.shape[0]
        assert blocks.shape == (n, self.row_bytes(type, k))
        assert blocks.is_contiguous()
        out = torch.empty(n, k, dtype=torch.float32) if out is None else out
        traits = self.call["ggml_get_type_traits"](TYPES[type]).contents
        traits.to_float(blocks.data_ptr(), out.data_ptr(), n * k)
        return out

    def buffer_types(self) -> dict[str, int]:
        """Where the CPU backend can keep a matrix: "CPU" as it is in the file, and repacked for its kernels."""
        call = self.call
        places = [call["ggml_backend_cpu_buffer_type"]()]
        register = call["ggml_backend_cpu_reg"]()
        address = call["ggml_backend_reg_get_proc_address"](register, b"ggml_backend_dev_get_extra_bufts")
        if address:
            list_extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)
            extra = list_extra(call["ggml_backend_reg_dev_get"](register, 0))
            while extra[len(places) - 1]:
                places.append(extra[len(places) - 1])
        return {call["ggml_backend_buft_name"](place).decode(): place for place in places}

    def backend(self, threads: int) -> int:
        """The CPU backend with a pool of `threads` threads, as llama.cpp's programs make it."""
        if threads not in self._backends:
            self._backends[threads] = self._new_backend(threads)
        return self._backends[threads]

    def _new_backend(self, threads: int) -> int:
        params = _ThreadpoolParams()
        self.call["ggml_threadpool_params_init"](ctypes.byref(params), threads)
        backend = self.call["ggml_backend_cpu_init"]()
        self.call["ggml_backend_cpu_set_n_threads"](backend, threads)
        pool = self.call["ggml_threadpool_new"](ctypes.byref(params))
        self.call["ggml_backend_cpu_set_threadpool"](backend, pool)
        return backend


class Matrix:
    """W [n, k] in memory of the library's, of a type and in a place of `buffer_types`; multiplies float32 x.

    `fill` gives it its blocks. Raises ValueError where the library has no such place, or no kernel there for that
    type and shape.
    """

    def __init__(self, type: str, n: int, k: int, threads: int, place: str = "CPU") -> None:
        self._library = library()
        self._call = self._library.call
        self._backend = self._library.backend(threads)
        self.n, self.k = n, k
        self._graphs: dict[tuple[int, int], tuple[Tensor, Tensor, int, list[int]]] = {}
        self._context = self._new_context()
        self._buffer = None
        kind = TYPES[type]
        self._weight = self._call["ggml_new_tensor_2d"](self._context, kind, k, self.n)
        places = self._library.buffer_types()
        if place not in places:
            raise ValueError(f"place is {place!r}; this library has {', '.join(places)}")
        buffer_type = places[place]
        size = self._call["ggml_backend_buft_get_alloc_size"](buffer_type, self._weight)
        self._buffer = self._call["ggml_backend_buft_alloc_buffer"](buffer_type, size)
        self._call["ggml_backend_buffer_set_usage"](self._buffer, _USAGE_WEIGHTS)
        base = self._call["ggml_backend_buffer_get_base"](self._buffer)
        self._call["ggml_backend_tensor_alloc"](self._buffer, self._weight, base)
        if not self._supported():
            raise ValueError(f"the library has no product for {type} {n}x{k} in {place}")
        self._shape = (n, self._library.row_bytes(type, k))

    def fill(self, blocks: Tensor) -> None:
        """Copies blocks, uint8 [n, bytes of a row], into the matrix, repacked where its place is for that."""
        assert (blocks.dtype, tuple(blocks.shape)) == (torch.uint8, self._shape)
        assert blocks.is_contiguous()
        self._call["ggml_backend_tensor_set"](self._weight, blocks.data_ptr(), 0, blocks.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """y [m, n] = x [m, k] @ W^T, float32. The same memory is returned for the same x: nothing is copied."""
        _, y, graph, _ = self._graph(x)
        status = self._call["ggml_backend_graph_compute"](self._backend, graph)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return y

    def _graph(self, x: Tensor) -> tuple[Tensor, Tensor, int, list[int]]:
        m = x.shape[0]
        key = (x.data_ptr(), m)
        if key not in self._graphs:
            assert x.dtype == torch.float32
            assert x.shape == (m, self.k)
            assert x.is_contiguous()
            y = torch.empty(m, self.n)
            context = self._new_context()
            source = self._call["ggml_new_tensor_2d"](context, TYPES["f32"], self.k, m)
            target = self._call["ggml_mul_mat"](context, self._weight, source)
            buffers = [self._wrap(source, x), self._wrap(target, y)]
            graph = self._call["ggml_new_graph"](context)
            self._call["ggml_build_forward_expand"](graph, target)
            self._graphs[key] = (x, y, graph, [context, *buffers])  # holds x: its address must stay its own
        return self._graphs[key]

    def _wrap(self, tensor: int, memory: Tensor) -> int:
        buffer = self._call["ggml_backend_cpu_buffer_from_ptr"](memory.data_ptr(), memory.nbytes)
        self._call["ggml_backend_tensor_alloc"](buffer, tensor, memory.data_ptr())
        return buffer

    def _supported(self) -> bool:
        context = self._new_context()
        source = self._call["ggml_new_tensor_2d"](context, TYPES["f32"], self.k, 1)
        product = self._call["ggml_mul_mat"](context, self._weight, source)
        device = self._call["ggml_backend_reg_dev_get"](self._call["ggml_backend_cpu_reg"](), 0)
        supported = self._call["ggml_backend_dev_supports_op"](device, product)
        self._call["ggml_free"](context)
        return supported

    def _new_context(self) -> int:
        return self._call["ggml_init"](_InitParams(OVERHEAD, None, True))

    def __del__(self) -> None:
        for _, _, _, (context, *buffers) in self._graphs.values():
            for buffer in buffers:
                self._call["ggml_backend_buffer_free"](buffer)
            self._call["ggml_free"](context)
        if self._buffer is not None:
            self._call["ggml_backend_buffer_free"](self._buffer)
        self._call["ggml_free"](self._context)


def _function(found: ctypes.CDLL, name: str, result: object, arguments: tuple[object, ...]) -> Callable:
    function = getattr(found, name)
    function.restype, function.argtypes = result, arguments
    return function
