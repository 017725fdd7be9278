"""The random states that GPT-NeoX saves, and by default requires when it loads a checkpoint."""

import hashlib
import random
import struct
from dataclasses import replace
from functools import cache
from typing import Any

from neox_bridge.formats.pickle_writer import numpy_array
from neox_bridge.tensors.tensor_ref import TensorRef

_WORDS = 624
_PHILOX_BYTES = 16  # seed and offset
_OLD_PREFIX_BYTES = 800
_MODEL_PARALLEL = 2718  # megatron/mpu/random.py, model_parallel_cuda_manual_seed


def python_state(seed: int) -> tuple[Any, ...]:
    """``random.getstate()`` after ``random.seed(seed)``."""
    return random.Random(seed).getstate()


def numpy_state(seed: int) -> tuple[Any, ...]:
    """``numpy.random.get_state()`` after seeding: name, words and position of the generator."""
    words = struct.pack(f"<{_WORDS}I", *_mt19937(seed))
    return ("MT19937", numpy_array(words, "<u4", (_WORDS,)), _WORDS, 0, 0.0)


def torch_state(seed: int) -> bytes:
    """``torch.get_rng_state()`` after ``torch.manual_seed(seed)``: 5056 bytes.

    They are seed, left, seeded, next, the words as uint64, and the empty cache of normal samples
    (ATen/CPUGeneratorImpl.cpp, CPUGeneratorImplState).
    """
    words = struct.pack(f"<{_WORDS}Q", *_mt19937(seed))
    return struct.pack("<QiiQ", seed, 1, 1, 0) + words + bytes(40)


def cuda_state(seed: int) -> bytes:
    """``torch.cuda.get_rng_state()``: the seed and the offset of a Philox generator, 16 bytes."""
    return struct.pack("<qq", seed, 0)


def current_cuda_state(state: bytes) -> bytes:
    """The state of a GPU generator for torch 1.13 and later: seed and offset, 16 bytes.

    Older versions of torch save 800 meaningless bytes before them
    (ATen/cuda/CUDAGeneratorImpl.cpp), and newer versions refuse such a state. Other states, such as
    those of a CPU, are returned unchanged.
    """
    return state[-_PHILOX_BYTES:] if len(state) == _PHILOX_BYTES + _OLD_PREFIX_BYTES else state


def current_cuda_tensor(state: Any) -> Any:
    """``current_cuda_state`` for a tensor in a file. Other values are returned unchanged."""
    if isinstance(state, TensorRef) and state.shape == (_PHILOX_BYTES + _OLD_PREFIX_BYTES,):
        return replace(state, offset=state.offset + _OLD_PREFIX_BYTES, shape=(_PHILOX_BYTES,))
    return state


def old_cuda_state(state: bytes) -> bytes:
    """The state of a GPU generator for torch before 1.13, with 800 bytes of -1 before it.

    States of other sizes, such as those of a CPU, are returned unchanged.
    """
    return b"\xff" * _OLD_PREFIX_BYTES + state if len(state) == _PHILOX_BYTES else state


def model_parallel_seed(seed: int, tp_rank: int) -> int:
    """The seed of GPT-NeoX's generator for tensor-parallel regions."""
    return seed + _MODEL_PARALLEL + tp_rank


@cache
def _mt19937(seed: int) -> tuple[int, ...]:
    """The words of a Mersenne Twister after seeding, the same in numpy and torch."""
    words = [seed & 0xFFFFFFFF]
    for index in range(1, _WORDS):
        last = words[-1]
        words.append((1812433253 * (last ^ (last >> 30)) + index) & 0xFFFFFFFF)
    return tuple(words)


def of_rank(state: bytes, tp_rank: int) -> tuple[bytes, bool]:
    """The state of the model-parallel generator of tensor-parallel rank ``tp_rank``.

    On a GPU the seeds count up by rank (``model_parallel_seed``), and the ranks draw equally often,
    so the offset is the same. torch before 1.13 has 800 more bytes before it. The generator of a
    CPU has no such rule, so its new state is seeded with a hash of rank 0's state.

    Args:
        state: The state of rank 0.
        tp_rank: The rank.

    Returns:
        The state, and whether it is the one that the rank would have had from the start.
    """
    if tp_rank == 0:
        return state, True
    if len(state) in (_PHILOX_BYTES, _PHILOX_BYTES + _OLD_PREFIX_BYTES):
        seed, offset = struct.unpack("<Qq", state[-_PHILOX_BYTES:])
        new = struct.pack("<Qq", (seed + tp_rank) % 2**64, offset)
        return state[:-_PHILOX_BYTES] + new, True
    digest = hashlib.sha256(state + struct.pack("<I", tp_rank)).digest()
    return torch_state(int.from_bytes(digest[:4], "little")), False
