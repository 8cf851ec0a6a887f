"""A tensor -> an exact 64-bit number that changes with any bit, any position, the shape or the dtype."""

import functools
from collections.abc import Iterator

import torch

from sampling.protocol import Fingerprints, Weights

CHUNK = 1 << 20
"""Words taken at a time: bounds the extra memory to 16 MiB."""


def fingerprint(tensor: torch.Tensor) -> int:
    """The same number on any device, in any order of reduction.

    Σ_i word_i · m_i mod 2^64 over the tensor's 32-bit words, with an odd pseudo-random m_i per position.
    Integer sums commute; odd factors are invertible, so one changed element always shows; distinct factors
    show permutations. Words of 32 bits, because the top bit of a 64-bit word would only count modulo 2: an
    even number of flipped signs would cancel. Not cryptographic: it guards against accidents.
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.numel() % 4 or raw.storage_offset() % 4:  # an int32 view needs whole, aligned words
        raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 4)).clone()
    words = raw.view(torch.int32)
    total = 0
    for chunk, start in enumerate(range(0, words.numel(), CHUNK)):
        part = words[start : start + CHUNK].to(torch.int64)
        total += int((part * _odd_factors(words.device)[: part.numel()]).sum()) * (_mix(chunk) | 1)
    for axis, size in enumerate(tensor.shape):
        total += _mix(size) * (_mix(axis + (1 << 32)) | 1)
    total += sum(_mix(ord(letter) << i) for i, letter in enumerate(str(tensor.dtype)))
    return total % (1 << 64)


def observed(weights: Weights, seen: Fingerprints) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass `weights` through, noting fingerprints in `seen`, for samplers whose engine hides its tensors."""
    for name, tensor in weights:
        seen[name] = fingerprint(tensor)
        yield name, tensor


def _mix(value: int) -> int:
    """splitmix64's finaliser: a pseudo-random 64-bit number for each integer."""
    value = (value + 0x9E3779B97F4A7C15) % (1 << 64)
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return value ^ (value >> 31)


@functools.cache
def _odd_factors(device: torch.device) -> torch.Tensor:
    """One odd pseudo-random int64 per position of a chunk; made on the CPU, so the same for every device."""
    generator = torch.Generator().manual_seed(0x5EED)
    low, high = torch.randint(1 << 32, (2, CHUNK), generator=generator, dtype=torch.int64)
    return ((high << 32) | low | 1).to(device)
