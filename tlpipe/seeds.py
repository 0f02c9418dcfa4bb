"""Derive randomness: one number or generator for each purpose, from one seed."""

import hashlib

import numpy as np


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Return a generator that depends on ``seed`` and ``purpose`` only."""
    return np.random.default_rng(_digest(seed, purpose))


def uniform(seed: int, key: str) -> float:
    """Return a number in [0, 1) that depends on ``seed`` and ``key`` only, not on any order."""
    return (_digest(seed, key) >> 11) * 2.0**-53


def _digest(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8])
