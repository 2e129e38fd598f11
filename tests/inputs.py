"""Families of inputs that the tests share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

CSRC = Path(__file__).parents[1] / "csrc"


def number_in(file: str, name: str) -> int:
    """A constant of the kernels, from their source: `constexpr TYPE name = number;` in csrc/`file`, once."""
    (number,) = re.findall(rf"constexpr \w+ {name} = (\d+);", (CSRC / file).read_text())
    return int(number)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

#: Around a vector (63), a kernel's inner block (1023) and many chunks of the GPU kernels; 65537 leaves one element.
SIZES = (0, 1, 7, 63, 1023, 65535, 65536, 65537)
CHUNK = number_in("cpu/kernels.h", "kChunk")  # of the CPU kernels

#: Shapes of one list: empty tensors first, in the middle and last, and a 0-dimensional one.
LIST_WITH_EMPTIES = ((0,), (5, 7), (3, 0, 2), (), (129,), (0, 4))


def gradients(
    K: int, shapes: Sequence[Sequence[int] | int], dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[list[Tensor]]:
    """K lists of heavy-tailed tensors (a gradient's largest element is far above its typical one)."""
    generator = torch.Generator().manual_seed(seed)

    def one(shape: Sequence[int] | int) -> Tensor:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        tail = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_(min=0.02).rsqrt()
        return (normal * tail).to(dtype)

    return [[one(shape) for shape in shapes] for _ in range(K)]


def _misaligned(t: Tensor) -> Tensor:
    """Contiguous, but one element after the start of its memory."""
    memory = t.new_full((t.numel() + 1,), float("nan"))
    view = memory[1:].view(t.shape)
    return view.copy_(t)


def _with_gaps(t: Tensor) -> Tensor:
    """Every second element of its memory; NaN between them."""
    memory = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
    return memory[..., ::2].copy_(t)


def _cropped(t: Tensor) -> Tensor:
    """The inside of a larger block: dense rows, NaN around them."""
    memory = t.new_full((t.shape[0] + 2, *t.shape[1:-1], t.shape[-1] + 3), float("nan"))
    return memory[1:-1, ..., 2:-1].copy_(t)


#: The same values of a 4-dimensional tensor, laid out in memory otherwise.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "misaligned": _misaligned,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "gaps": _with_gaps,
    "cropped": _cropped,
}
IMAGE = (6, 5, 7, 3)  # no two dimensions alike, and odd where possible


def families(K: int, seed: int = 0, n: int = 12) -> dict[str, Tensor]:
    """Matrices J [K, n] float64 whose rows are K gradients: the geometries that decide the min-norm point.

    "random" and "wide" are generic (affinely independent rows); the others are degenerate on purpose.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    random = normal(K, n)
    g = normal(n)
    zero = random.clone()
    zero[seed % K] = 0
    equal_two = random.clone()
    equal_two[0] = equal_two[-1]
    opposite = random.clone()
    opposite[-1] = -opposite[0]
    return {
        "random": random,
        "wide": random * torch.logspace(-2, 2, K, dtype=torch.float64)[:, None],
        "aligned": 0.3 * random + g,  # cosines about 0.9: the case of logit distillation
        "conflicting": 0.3 * random + g * torch.tensor([1.0, -1.0]).double().repeat(K)[:K, None],
        "parallel": g * torch.arange(1.0, K + 1, dtype=torch.float64)[:, None],
        "nearly parallel": g + 1e-4 * random,
        "equal": g.expand(K, n).clone(),
        "two equal": equal_two,
        "opposite": opposite,
        "one zero": zero,
        "all zero": torch.zeros(K, n, dtype=torch.float64),
        "flat": normal(K, 1),  # all on one line through the origin, either side
        "tiny": random * 1e-20,
        "huge": random * 1e15,
    }


FAMILIES = tuple(families(2))


def gram_of(J: Tensor) -> Tensor:
    """Of the rows of J."""
    return J @ J.T
