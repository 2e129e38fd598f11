"""How the Gram matrix is obtained: the `gram=` of the optimizers and of `backward`. One small file per source.

==================  ====================  =======================================================  ==================
gram=               full backward passes  besides                                                  weights
==================  ====================  =======================================================  ==================
``"exact"``         K                     one read of K gradients in `step`                        exact
``"overlap"``       K                     one read of K - 1 gradients, hidden in the last pass     exact
``"lag"``           K                     nothing: the products are taken by the pass that steps   one step old
`Probe`             1                     K passes down to one block                               of that block
`Feature`           1                     K passes down to the shared representation               of an upper bound
`Every` (n)         1, in n - 1 of n      in one step of n what its source costs                   up to n - 1 old
`Ema` (beta)        as its source                                                                  averaged
``"none"``          1                     nothing; for weightings with ``needs_gram = False``      need no Gram
==================  ====================  =======================================================  ==================

Where one full pass is taken it is that of sum_i c_i L_i with c_i = pi_i / L_i (pi_i for weightings of raw
gradients), a constant: log L is never differentiated, the graph is walked once, and one gradient set is stored. Every
parameter takes the gradient of that sum. Under accumulation each call is weighed by itself, and counts by its
`share`; where the c_i follow 1 / L_i (`rescale="none"`, log-gradients) shares that sum to more than 1 are refused, as
the step would be too long, elsewhere they add up as gradients do.
"""

from .ema import Ema
from .every import Every
from .feature import Feature
from .lag import Lag
from .names import NAMES, choose
from .overlap import Overlap
from .probe import Probe
from .source import Exact, Source
from .unmeasured import Unmeasured

__all__ = ["NAMES", "Ema", "Every", "Exact", "Feature", "Lag", "Overlap", "Probe", "Source", "Unmeasured", "choose"]
