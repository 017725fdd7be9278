"""The random states that GPT-NeoX saves and, unless told otherwise, wants back when it loads."""

import random
import struct
from typing import Any

from neox_bridge.formats.pickle_writer import numpy_array

_WORDS = 624
_MODEL_PARALLEL = 2718  # megatron/mpu/random.py, model_parallel_cuda_manual_seed


def python_state(seed: int) -> tuple[Any, ...]:
    """``random.getstate()`` after ``random.seed(seed)``."""
    return random.Random(seed).getstate()


def numpy_state(seed: int) -> tuple[Any, ...]:
    """``numpy.random.get_state()`` after seeding: the generator's name, its words, its position."""
    words = struct.pack(f"<{_WORDS}I", *_mt19937(seed))
    return ("MT19937", numpy_array(words, "<u4", (_WORDS,)), _WORDS, 0, 0.0)


def torch_state(seed: int) -> bytes:
    """``torch.get_rng_state()`` after ``torch.manual_seed(seed)``: 5056 bytes.

    Seed, left, seeded, next, the words as uint64, and the empty cache of normal samples
    (ATen/CPUGeneratorImpl.cpp, CPUGeneratorImplState).
    """
    words = struct.pack(f"<{_WORDS}Q", *_mt19937(seed))
    return struct.pack("<QiiQ", seed, 1, 1, 0) + words + bytes(40)


def cuda_state(seed: int) -> bytes:
    """``torch.cuda.get_rng_state()``: seed and offset of a Philox generator, 16 bytes."""
    return struct.pack("<qq", seed, 0)


def model_parallel_seed(seed: int, tp_rank: int) -> int:
    """The seed of GPT-NeoX's generator for tensor-parallel regions."""
    return seed + _MODEL_PARALLEL + tp_rank


def _mt19937(seed: int) -> list[int]:
    """Matsumoto and Nishimura's initialisation, which numpy and torch share."""
    words = [seed & 0xFFFFFFFF]
    for index in range(1, _WORDS):
        last = words[-1]
        words.append((1812433253 * (last ^ (last >> 30)) + index) & 0xFFFFFFFF)
    return words
