"""Fused kernels and drop-in optimizers that train on K losses and balance their gradients in every step (DTO-KD).

losses --> gradients --> gram --> min_norm_weights, balance --> combine, or an optimizer's fused step
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _supported, debug, sources, weighting  # the first refuses an old Python or torch
from ._version import __version__
from .accumulate import backward
from .backends import backend_info, use_backend
from .held_out import measure_held_out
from .one_loss import BalancedLoss
from .ops import balance, combine, gram, min_norm_weights
from .optim import DTOSGD, DTOAdamW, DTOLion
from .probing import probe
from .types import Balance

if TYPE_CHECKING:
    from . import distributed as distributed

del _supported

__all__ = [
    "DTOSGD",
    "Balance",
    "BalancedLoss",
    "DTOAdamW",
    "DTOLion",
    "__version__",
    "backend_info",
    "backward",
    "balance",
    "combine",
    "debug",
    "gram",
    "measure_held_out",
    "min_norm_weights",
    "probe",
    "sources",
    "use_backend",
    "weighting",
]


def __getattr__(name: str) -> Any:
    """`distributed` is imported when it is asked for: it needs torch.distributed, which not every torch has."""
    if name == "distributed":
        return import_module(".distributed", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
