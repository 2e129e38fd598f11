"""From the Gram matrix to the weights: one small file per family.

A weighting is any callable ``(gram [K, K], losses [K]) -> weights [K]``, or of the Gram alone, as TorchJD's
Gramian weightings are. It sees the Gram matrix of log-gradients, unless it has ``log_gradients = False``; then
it sees the raw one and its weights multiply the raw gradients.
"""

from .dto import DTO
from .fixed import Fixed, LogSum

__all__ = ["DTO", "Fixed", "LogSum"]
