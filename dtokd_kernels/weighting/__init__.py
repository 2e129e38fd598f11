"""From the Gram matrix to the weights: one small file per rule.

A weighting is any callable ``(gram [K, K], losses [K]) -> weights [K]``, or of the Gram alone, as TorchJD's Gramian
weightings are. Two attributes describe what it needs, both True if absent:

- ``log_gradients``: it sees the Gram matrix of log-gradients, and its weights multiply g_i / L_i. Where it is False it
  sees the raw one, and its weights multiply the raw gradients.
- ``needs_gram``: its weights depend on that matrix. Where it is False any [K, K] tensor will do.

Weights may be negative (some rules need that). Other shapes than [K] are an error. If one is not finite the step is
skipped. An objective whose gradient is zero has weight 0, whatever the rule returns.

Rules with a memory are `Stateful`; the optimizers keep theirs in their `state_dict()`, under "weighting".

None of the rules here stalls the device. They compute in float64, and their results are the same bits each time.

==========================  ===========================================================  ====  ====  ======
name                        what the weights solve                                       log   Gram  memory
==========================  ===========================================================  ====  ====  ======
`DTO`                       the shortest convex combination                              yes   yes   no
`Amortized`                 the same, approached from step to step                       yes   (1)   yes
`Reachable`                 the same, of log(L_i - m_i): what can still be gained        (3)   yes   yes
`Fixed`, `LogSum`           nothing: constants                                           (2)   no    no
`RLW`                       nothing: random                                              no    no    yes
`PCGrad`                    projections on the normal planes of conflicting gradients    no    yes   yes
`CAGrad`                    near the mean, the best for the worst objective              no    yes   no
`IMTLG`                     equal projections on all gradients                           no    yes   no
`ConFIG`                    equal cosines with all gradients                             no    yes   no
`UPGrad`                    each projected on the dual cone, then the mean               no    yes   no
`DualProj`                  the mean projected on the dual cone                          no    yes   no
`NashMTL`                   the largest product of gains                                 no    yes   no
`AlignedMTL`                principal components of one length                           no    yes   no
`DWA`                       a loss that falls slowly has more weight                     no    no    yes
`UncertaintyWeighting`      a learned variance divides each loss                         no    no    yes
`Share`                     each weighted gradient has its share of the norms            no    yes   yes
`TaskFirst`                 the primary gradient, and those not against it               no    yes   yes
`Auto`                      one of four rules, chosen on held-out samples                (3)   (4)   yes
`HeldOut`                   nearest to the task's gradient on held-out samples           (3)   (4)   yes
`WhileBetter`               how much better the teacher is on held-out samples           yes   no    yes
==========================  ===========================================================  ====  ====  ======

log: the default of `log_gradients`; most take it as an option. (1) for reading "gram" only; (2) yes for `LogSum`;
(3) no: the weights multiply raw gradients; (4) the products are measured by `measure_held_out`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..types import Weighting
from .alignedmtl import AlignedMTL
from .amortized import Amortized
from .auto import Auto
from .cagrad import CAGrad
from .config import ConFIG
from .dto import DTO
from .dualproj import DualProj
from .dwa import DWA
from .fixed import Fixed, LogSum
from .heldout import HeldOut
from .imtlg import IMTLG
from .nashmtl import NashMTL
from .pcgrad import PCGrad
from .reachable import Reachable
from .rlw import RLW
from .share import Share
from .stateful import Stateful
from .taskfirst import TaskFirst
from .uncertainty import UncertaintyWeighting
from .upgrad import UPGrad
from .whilebetter import WhileBetter

__all__ = [
    "DTO",
    "DWA",
    "IMTLG",
    "NAMES",
    "RLW",
    "AlignedMTL",
    "Amortized",
    "Auto",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "Fixed",
    "HeldOut",
    "LogSum",
    "NashMTL",
    "PCGrad",
    "Reachable",
    "Share",
    "Stateful",
    "TaskFirst",
    "UPGrad",
    "UncertaintyWeighting",
    "WhileBetter",
    "from_name",
]

_CONSTRUCTORS: dict[str, Callable[..., Weighting]] = {
    "alignedmtl": AlignedMTL,
    "amortized": Amortized,
    "auto": Auto,
    "cagrad": CAGrad,
    "config": ConFIG,
    "dto": DTO,
    "dualproj": DualProj,
    "dwa": DWA,
    "eq18": partial(Amortized, "eq18"),
    "famo": partial(Amortized, "famo"),
    "fixed": Fixed,
    "heldout": HeldOut,
    "imtlg": IMTLG,
    "logsum": LogSum,
    "mgda": partial(DTO, log_gradients=False),
    "nashmtl": NashMTL,
    "pcgrad": PCGrad,
    "reachable": Reachable,
    "rlw": RLW,
    "share": Share,
    "taskfirst": TaskFirst,
    "uncertainty": UncertaintyWeighting,
    "upgrad": UPGrad,
    "whilebetter": WhileBetter,
}

#: The names that `from_name` takes.
NAMES = tuple(_CONSTRUCTORS)


def from_name(name: str, **options: Any) -> Weighting:
    """A weighting from the name that a command line gives it.

    Args:
        name: one of `NAMES`, in lower case: a class's name ("uncertainty" for `UncertaintyWeighting`), or "famo" and
            "eq18" for these readings of `Amortized`, or "mgda" for `DTO` on raw gradients.
        options: passed to the class.

    Raises:
        ValueError: no such name, or a value that the class refuses.
        TypeError: no such option.

    Example:
        >>> from dtokd_kernels import weighting
        >>> weighting.from_name("cagrad", c=0.4)
        CAGrad(c=0.4, log_gradients=False)
    """
    if not isinstance(name, str) or name not in _CONSTRUCTORS:
        raise ValueError(f"from_name: no weighting is called {name!r}; choose one of {', '.join(NAMES)}")
    return _CONSTRUCTORS[name](**options)
