"""What a comparison found: in words, and in a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from ..metric import is_lower_better, rank
from .arms import NONE
from .differences import Difference, Paired

#: How many seeds a hint may ask for.
_MOST_SEEDS = 30


@dataclass(frozen=True)
class Arm:
    """One arm over the seeds.

    Attributes:
        text: the arm.
        chosen: what it is chosen by, a number per seed; NaN where a run has diverged.
        judged: what judges it, likewise; the same numbers where there is one split.
        flags: for `dtokd train`.
        failed: seeds with which it has diverged, or whose evaluation gave NaN.
        seconds: per iteration; NaN if not known.
        rates: conflict_rate, vertex_rate and share_NAME of each objective, as far as they were measured.
    """

    text: str
    chosen: Sequence[float]
    judged: Sequence[float]
    flags: str = ""
    failed: Sequence[int] = ()
    seconds: float = math.nan
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What was compared.

    Attributes:
        metric: of the evaluation.
        seeds: of each arm.
        epochs, full: of the runs, and of the schedule that they shorten.
        chooses, judges: names of the splits; the same where one does both.
        images: of the split that judges; 0 where that is not known, as of a stream.
        jobs: most runs at a time, which disturb each other's times.
        views: augmentations of each image that arms with a teacher saw, where a cache limits them; 0 without a limit.
    """

    metric: str
    seeds: Sequence[int]
    epochs: int
    full: int
    chooses: str
    judges: str
    images: int
    jobs: int = 1
    views: int = 0


@dataclass(frozen=True)
class Line:
    """An arm in the table.

    Attributes:
        arm: see `Arm`.
        mean, deviation: of what judges it; NaN for an arm that has failed, and without a spread.
        to_none, to_fixed: improvement on the arm without a teacher, and on the best fixed weights; None if unknown.
        to_bare_time, to_fixed_time: seconds per iteration over those without a teacher, and of the best fixed weights.
    """

    arm: Arm
    mean: float
    deviation: float
    to_none: Difference | None
    to_fixed: Difference | None
    to_bare_time: float
    to_fixed_time: float


@dataclass(frozen=True)
class Verdict:
    """What a comparison found.

    Attributes:
        kind: "helps", "hurts", "undecided", or "none" where nothing could be compared.
        text: it in words, a sentence per line.
        arm: the best of those with a teacher, to use if it helps; None if there is none.
        fixed: the best of the fixed weights.
        lines: of the table, the best arm first, those that have failed last.
    """

    kind: str
    text: Sequence[str]
    arm: str | None
    fixed: str | None
    lines: Sequence[Line]


def judge(arms: Sequence[Arm], setting: Setting) -> Verdict:
    """Compare all arms with the one without a teacher, and with the best fixed weights.

    The arm is chosen by the mean of `chosen`, and judged by `judged`.
    """
    lower = is_lower_better(setting.metric)
    whole = [arm for arm in arms if not arm.failed]
    order = sorted(whole, key=lambda arm: -rank(fmean(arm.chosen), lower))
    fixed = next((arm.text for arm in order if arm.text.startswith("fixed")), None)
    resolution = 100 / setting.images if "top" in setting.metric and setting.images else 0.0
    paired = Paired({arm.text: arm.judged for arm in whole}, -1 if lower else 1, resolution) if whole else None
    there = {arm.text for arm in whole}

    seconds = {arm.text: arm.seconds for arm in arms if arm.seconds > 0}

    def line(arm: Arm) -> Line:
        def to(other: str | None) -> Difference | None:
            return paired.between(arm.text, other) if paired and other in there and arm.text in there else None

        spread = stdev(arm.judged) if arm.text in there and len(arm.judged) > 1 else math.nan
        mean = fmean(arm.judged) if arm.text in there else math.nan
        costs = [arm.seconds / seconds.get(other, math.nan) for other in (NONE, fixed or "")]
        return Line(arm, mean, spread, to(NONE), to(fixed), *costs)

    lines = [line(arm) for arm in [*order, *(arm for arm in arms if arm.failed)]]
    failures = [
        f"{arm.text} has no result with the seeds {_listed(arm.failed)}: it diverged; a smaller lr= may help."
        for arm in arms
        if arm.failed
    ]
    candidates = [line for line in lines if line.arm.text != NONE and line.to_none is not None]
    if paired is None or not candidates:
        reason = "the arm without a teacher has" if NONE not in there else "all arms with a teacher have"
        return Verdict("none", [f"No verdict: {reason} diverged.", *failures], None, fixed, lines)
    kind, arm, text = _decide(candidates, paired, setting)
    text += [*_against_fixed(lines, arm, fixed, setting), *failures, *_limits(setting)]
    return Verdict(kind, text, arm, fixed, lines)


def _decide(candidates: Sequence[Line], paired: Paired, setting: Setting) -> tuple[str, str, list[str]]:
    """The kind, the arm and the first sentences; the candidates are in order, the best first."""
    with_seeds = f"with {paired.seeds} seed{'s' if paired.seeds > 1 else ''}"
    gains = [(line, line.to_none) for line in candidates if line.to_none is not None]
    best, gain = next(((line, gain) for line, gain in gains if gain.better), gains[0])
    name = best.arm.text
    if gain.better:
        text = [f"Distillation helps: {_told(gain, setting)} with {name}."]
        close = [line.arm.text for line in candidates if line is not best and not _apart(paired, name, line.arm.text)]
        if close:
            one = len(close) == 1
            rules = f"{'the arm' if one else 'the arms'} {_listed(close)} cannot be told apart from it {with_seeds}"
            text.append(f"{rules[0].upper()}{rules[1:]}.")
        return "helps", name, [*text, f"Use: {best.arm.flags}"]
    if all(gain.worse for _, gain in gains):
        told = f"Distillation hurts: {_told(gain, setting)} even with the best arm, {name}."
        return "hurts", name, [told, "Use: no teacher; or try another teacher, temperature or --kd-distill-type."]
    if gain.worse:  # an arm with a worse mean varies more, so that it may help
        left = _listed([line.arm.text for line, other in gains if not other.worse])
        told = f"Undecided: {_told(gain, setting)} with the best arm, {name}, so that it hurts; {left} cannot be told"
        text = [f"{told} apart from no teacher {with_seeds}."]
        return "undecided", name, [*text, "Use: no teacher; or add seeds with --seeds: the finished runs are kept."]
    if paired.seeds < 2:
        told = f"Undecided: one seed shows no spread; it gave {_number(gain.mean, setting)} with the best arm, {name}."
        return "undecided", name, [told, "Add seeds, as in --seeds 0 1 2: the finished runs are kept."]
    more = paired.seeds_for(name, NONE, _MOST_SEEDS)
    hint = f"about {more} seeds would settle a difference of this size" if more else "more seeds would hardly settle it"
    told = f"Undecided: {_told(gain, setting)} with the best arm, {name}"
    text = [f"{told}, may be chance {with_seeds}; {hint}."]
    if more:
        text.append("Add them at once with --seeds: the finished runs are kept.")
    return "undecided", name, [*text, f"The best so far: {best.arm.flags if gain.mean > 0 else 'no teacher.'}"]


def _apart(paired: Paired, arm: str, other: str) -> bool:
    difference = paired.between(arm, other)
    return difference.better or difference.worse


def _against_fixed(lines: Sequence[Line], arm: str, fixed: str | None, setting: Setting) -> list[str]:
    difference = next(line.to_fixed for line in lines if line.arm.text == arm)
    if fixed is None or difference is None or fixed == arm or not math.isfinite(difference.low):
        return []
    told = "better" if difference.better else "worse" if difference.worse else "not told apart"
    searched = sum(line.arm.text.startswith("fixed") for line in lines)
    cost = f" (found with {searched} runs per seed)" if searched > 1 else ""
    return [f"{arm} against the best fixed weights, {fixed}{cost}: {_told(difference, setting)}, {told}."]


def _limits(setting: Setting) -> list[str]:
    text = []
    if setting.chooses == setting.judges:
        text.append(
            f"The same {_images(setting)} of {setting.judges!r} chose and judged, so the best arm's number is a little "
            "too good; --judge-split NAME judges with others."
        )
    else:
        text.append(f"{setting.chooses!r} chose, the {_images(setting)} of {setting.judges!r} judged.")
    if setting.epochs < setting.full:
        text.append(
            f"The runs had {setting.epochs} of {setting.full} epochs: what helps early may not help at the end."
        )
    if setting.views:
        text.append(
            f"Arms with a teacher saw {setting.views} augmentation{'s' if setting.views > 1 else ''} of each image "
            "(--kd-cache-views), none a new one in each epoch: their differences to none come from that too."
        )
    return text


def _images(setting: Setting) -> str:
    return f"{setting.images} images" if setting.images else "images"


def _told(difference: Difference, setting: Setting) -> str:
    unit = " points" if "top" in setting.metric else ""
    ends = f"{_number(difference.low, setting)} to {_number(difference.high, setting)}"
    return f"{_number(difference.mean, setting)}{unit} (95 % interval {ends})"


def _number(value: float, setting: Setting) -> str:
    """An improvement is positive, also of a loss."""
    return f"{value:+.{_digits(setting)}f}" if math.isfinite(value) else "unknown"


def _digits(setting: Setting) -> int:
    return 1 if "top" in setting.metric else 3


def _listed(values: Sequence[Any]) -> str:
    texts = list(map(str, values))
    return ", ".join(texts[:-1]) + f" and {texts[-1]}" if len(texts) > 1 else texts[0]


def rows_of(verdict: Verdict, setting: Setting) -> list[tuple[str, ...]]:
    """The table as text, its head first."""
    shares = sorted({name for line in verdict.lines for name in line.arm.rates if name.startswith("share_")})
    head = ["arm", setting.metric, "to none", f"to {verdict.fixed}" if verdict.fixed else "", "conflict", "vertex"]
    head += [f"share of {name.removeprefix('share_')}" for name in shares]
    head += ["s / iteration", "time to none", f"time to {verdict.fixed}" if verdict.fixed else ""]
    rows = [tuple(head)]
    for line in verdict.lines:
        rates = line.arm.rates
        numbers = [_percent(rates.get(name, math.nan)) for name in ("conflict_rate", "vertex_rate", *shares)]
        digits = 2 if "top" in setting.metric else 3
        spread = "" if math.isnan(line.deviation) else f" ± {line.deviation:.{digits}f}"
        cost = [f"{line.arm.seconds:.3g}", f"{line.to_bare_time:.2f}x", f"{line.to_fixed_time:.2f}x"]
        rows.append(
            (
                line.arm.text,
                "diverged" if line.arm.failed else f"{line.mean:.{digits}f}{spread}",
                _interval(line.to_none, line.arm.text == NONE, setting),
                _interval(line.to_fixed, line.arm.text == verdict.fixed, setting),
                *numbers,
                *("" if "nan" in text else text for text in cost),
            )
        )
    kept = [i for i, name in enumerate(head) if name and (i < 2 or any(row[i] for row in rows[1:]))]
    return [tuple(row[i] for i in kept) for row in rows]


def _interval(difference: Difference | None, reference: bool, setting: Setting) -> str:
    if reference or difference is None:
        return "reference" if reference and difference is not None else ""
    mean, low, high = (_number(value, setting) for value in (difference.mean, difference.low, difference.high))
    return f"{mean} ({low} to {high})" if math.isfinite(difference.low) else mean


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.0f} %"


def notes(setting: Setting) -> list[str]:
    """What the table's numbers are."""
    seeds = ", ".join(map(str, setting.seeds))
    disturbed = f"; up to {setting.jobs} runs shared the machine, which disturbs them" if setting.jobs > 1 else ""
    return [
        f"{setting.metric} of {setting.judges!r} after the last of {setting.epochs} epochs, mean and sample standard "
        f"deviation over the seeds {seeds}. Differences are improvements, seed by seed: a seed has the same initial "
        "student in all arms, and the same batches where they learn from the same images; their intervals hold "
        "together, for all pairs of arms, with 95 % (Tukey's, and no narrower than the paired t-interval). They are "
        "about the seeds, not about the choice of images, and hold for one look: seeds that are added until an "
        "interval excludes 0 find a difference too often.",
        "conflict, vertex: steps in which gradients pointed apart, and in which a weight was 0. share: of the norms of "
        f"the weighted gradients. s / iteration: the median over the epochs after the first{disturbed}.",
    ]


def as_markdown(verdict: Verdict, setting: Setting) -> str:
    """Verdict and table."""
    head, *body = rows_of(verdict, setting)
    table = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
    return "\n\n".join(["\n".join(verdict.text), "\n".join(table), *notes(setting)]) + "\n"


def as_data(verdict: Verdict, setting: Setting) -> dict[str, Any]:
    """All numbers, for JSON."""

    def pair(difference: Difference | None) -> dict[str, float] | None:
        return None if difference is None else vars(difference)

    return {
        "verdict": verdict.kind,
        "text": list(verdict.text),
        "arm": verdict.arm,
        "best_fixed": verdict.fixed,
        "setting": {**vars(setting), "seeds": list(setting.seeds)},
        "arms": [
            {
                "arm": line.arm.text,
                "flags": line.arm.flags,
                "chosen": list(line.arm.chosen),
                "judged": list(line.arm.judged),
                "failed_seeds": list(line.arm.failed),
                "mean": line.mean,
                "deviation": line.deviation,
                "to_none": pair(line.to_none),
                "to_best_fixed": pair(line.to_fixed),
                "seconds_per_iteration": line.arm.seconds,
                "time_to_none": line.to_bare_time,
                "time_to_best_fixed": line.to_fixed_time,
                **line.arm.rates,
            }
            for line in verdict.lines
        ],
    }
