"""Inputs that the reference and the kernels are both held to."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

SHAPES = [(1, 1), (1, 127), (7, 128), (83, 129), (128, 576), (130, 300), (33, 3884), (576, 130)]
"""M and K, or N and K: whole blocks, and edges of all sorts."""


def values(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Gaussian, columns a thousand times apart, a block of zeros and one of tiny values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x[:, ::37] *= 1000
    x[: rows // 2, :128] = 0
    x[rows // 2 :, 128:256] *= 1e-6
    return x


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def gaussian(rows: int, columns: int, *, outliers: bool = False, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    if outliers:  # channels, as activations have
        x[:, torch.randperm(columns, generator=generator)[: columns // 64]] *= 30
    return x


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture(name="values")
def _values() -> Callable[..., Tensor]:
    return values


@pytest.fixture(name="gaussian")
def _gaussian() -> Callable[..., Tensor]:
    return gaussian


@pytest.fixture(name="relative")
def _relative() -> Callable[[Tensor, Tensor], float]:
    return relative
