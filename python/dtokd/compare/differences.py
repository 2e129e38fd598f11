"""Paired differences between arms that were trained with the same seeds, with intervals that hold for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

import torch
from torch import Tensor

#: Of all intervals of a comparison together.
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean difference and its interval, which is infinite where nothing is known of the spread.

    Attributes:
        mean: over the seeds.
        low, high: ends of the interval.
    """

    mean: float
    low: float
    high: float

    @property
    def better(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0

    @property
    def worse(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.high < 0


class Paired:
    """Differences between any two arms; all intervals hold together with probability `LEVEL`.

    Each seed gives every arm the same initial student and the same batches, so a result is the sum of an effect of the
    seed, an effect of the arm and noise: a randomised block design. The half-width of an interval is the larger of

    - Tukey's, q s / sqrt(seeds): s^2 is the noise of all arms together, with (arms - 1) (seeds - 1) degrees of freedom,
      and q the quantile of the studentized range of that many arms. It covers all pairs at once, so that it also holds
      for pairs that were picked after a look at the results (the best arm, the best fixed weight). It takes the noise
      to be the same in all arms.
    - that of the paired t-interval of these two arms alone, with seeds - 1 degrees of freedom. It covers one pair, and
      assumes nothing about the other arms: a rule that varies more than the others gets a wider interval by it.
    - the resolution of the results.

    Source: Tukey (1953); R. G. Miller, Simultaneous Statistical Inference, 1981, chapter 2.

    Args:
        results: by arm, a finite number for each seed, the seeds in the same order in all arms.
        sign: 1 where larger results are better, -1 where smaller ones are: differences above 0 are then improvements.
        resolution: the smallest difference that results can show, such as 100 / images for an accuracy in percent.
    """

    def __init__(self, results: Mapping[str, Sequence[float]], sign: int = 1, resolution: float = 0.0) -> None:
        self._results, self._sign, self._resolution = results, sign, resolution
        self.seeds = len(next(iter(results.values())))

    @property
    def noise(self) -> float:
        """Standard deviation of a result beside the effects of arm and seed; NaN for one seed or arm."""
        arms = len(self._results)
        if min(arms, self.seeds) < 2:
            return math.nan
        rows = torch.tensor(list(self._results.values()), dtype=torch.float64)
        rest = rows - rows.mean(1, keepdim=True) - rows.mean(0, keepdim=True) + rows.mean()
        return math.sqrt(float(rest.square().sum()) / ((arms - 1) * (self.seeds - 1)))

    def between(self, arm: str, other: str) -> Difference:
        """Of two arms: positive where the first is better."""
        if arm == other:
            return Difference(0.0, 0.0, 0.0)
        differences = self._differences(arm, other)
        mean, half = fmean(differences), self._half_width(differences, self.seeds)
        return Difference(mean, mean - half, mean + half)

    def seeds_for(self, arm: str, other: str, most: int) -> int | None:
        """How many seeds would tell two arms apart, if mean and spread stay; None for more than `most`."""
        differences = self._differences(arm, other)
        mean = abs(fmean(differences))
        return next((n for n in range(self.seeds, most + 1) if self._half_width(differences, n) < mean), None)

    def _differences(self, arm: str, other: str) -> list[float]:
        pairs = zip(self._results[arm], self._results[other], strict=True)
        return [self._sign * (a - b) for a, b in pairs]

    def _half_width(self, differences: Sequence[float], seeds: int) -> float:
        """Of an interval from so many seeds, with the spread of those that there are."""
        if self.seeds < 2:
            return math.inf
        arms = len(self._results)
        together = studentized_range(LEVEL, arms, (arms - 1) * (seeds - 1)) * self.noise
        alone = student_t(LEVEL, seeds - 1) * stdev(differences)
        return max(max(together, alone) / math.sqrt(seeds), self._resolution)


def student_t(level: float, freedom: int) -> float:
    """Quantile t of Student's distribution with `P(|T| < t) = level`: the range of two, over sqrt(2)."""
    return studentized_range(level, 2, freedom) / math.sqrt(2)


@cache
def studentized_range(level: float, arms: int, freedom: int) -> float:
    """Quantile of the studentized range: of the largest difference of `arms` normal numbers, over their estimated sd.

    Args:
        level: from 0 to 1, both excluded.
        arms: at least 2.
        freedom: degrees of freedom of the estimate, at least 1; more than 200 count as 200, which is 1 % off at most.

    Example:
        >>> round(studentized_range(0.95, 3, 10), 3)  # tables have 3.88
        3.877
    """
    freedom = min(freedom, 200)  # a narrower density would need finer steps
    low, high = 0.0, 1.0
    while _below(high, arms, freedom) < level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _below(middle, arms, freedom) < level else (low, middle)
    return high


def _below(q: float, arms: int, freedom: int) -> float:
    """P(range / sd < q), by the trapezoidal rule, which is exact to rounding for such smooth, fading integrands.

    P = integral f(s) R(q s) ds with R(r) = arms * integral phi(z) (Phi(z) - Phi(z - r))^(arms - 1) dz and f the density
    of the estimated sd; integrated over log s.
    """
    logs = torch.arange(-36 / freedom - 2, 2.3, 0.04, dtype=torch.float64)
    constant = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    density = (constant + freedom * (logs - logs.mul(2).exp() / 2)).exp()
    z = torch.arange(-8.5, 8.6, 0.1, dtype=torch.float64)
    inner: Tensor = torch.special.ndtr(z) - torch.special.ndtr(z - q * logs.exp()[:, None])
    normal = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    return float((density * (arms * normal * inner.pow(arms - 1)).sum(1)).sum() * 0.1 * 0.04)
