"""`dtokd sweep`: seeds x balances on one configuration, a table, and a paired comparison with the best fixed ones."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from .errors import UsageError
from .files import write_text
from .train.options import BALANCES
from .train.progress import Progress
from .train.run import train
from .train.rundir import read_rows, write_rows

#: What may follow a balance's colon, and the option it sets.
_OPTIONS = {
    "rescale": ("kd_balance_rescale", str),
    "params": ("kd_balance_params", str),
    "gram": ("kd_balance_gram", str),
    "opt": ("opt", str),
    "lr": ("lr", float),
    "temperature": ("kd_temperature", float),
}


def run(options: argparse.Namespace) -> int:
    """Train what is not yet trained, then write sweep.csv, sweep.md and the runs' figures.

    Args:
        options: of `train.options`, with `seeds` and `balances`.

    Returns:
        0, or 128 and the number of the signal that ended it.

    Raises:
        UsageError: as `train`, or a balance that cannot be read.
    """
    folder = options.output / (options.experiment or "sweep")
    settings = {text: parse_balance(text) for text in options.balances}
    if not options.val_split:
        raise UsageError("--val-split: empty, but the sweep compares evaluations; name a split")
    progress = Progress(options.epochs)
    for text, changes in settings.items():
        for seed in options.seeds:
            path = run_path(folder, text, seed)
            if _finished(path, options.epochs):
                continue
            own = argparse.Namespace(**{**vars(options), **changes, "seed": seed, "resume": "auto"})
            own.output, own.experiment = path.parent, path.name
            del own.seeds, own.balances
            if own.kd_balance == "none":  # a weighted sum is for the optimizer that ours stands for
                own.opt = own.opt.lower().removeprefix("dto")
            outcome = train(own, progress)
            if outcome.interrupted:
                return 128 + outcome.interrupted
            write_text(path / "finished", f"{own.epochs}\n")
    metric = ("ema_" if options.model_ema else "") + options.eval_metric
    results = {
        text: [_last(run_path(folder, text, seed), f"eval_{metric}") for seed in options.seeds] for text in settings
    }
    rows = compare(results, lower=metric.endswith("loss"))
    write_rows(
        folder / "sweep.csv",
        [
            {"balance": text, "seed": str(seed), metric: repr(value)}
            for text, values in results.items()
            for seed, value in zip(options.seeds, values, strict=True)
        ],
    )
    table = markdown(rows, metric, options.seeds, options.epochs)
    write_text(folder / "sweep.md", table)
    progress.say(table)
    return 0


def parse_balance(text: str) -> dict[str, object]:
    """The options that a balance of the sweep stands for.

    Raises:
        UsageError: it is none.

    Example:
        >>> parse_balance("fixed:0.3")
        {'kd_balance': 'none', 'task_loss_weight': 0.3, 'distill_loss_weight': 0.7}
        >>> parse_balance("dto:rescale=sum")
        {'kd_balance': 'dto', 'kd_balance_rescale': 'sum'}
    """
    name, _, rest = text.partition(":")
    if name not in BALANCES:
        raise UsageError(f"--balances: {text!r}; choose fixed:WEIGHT or one of {', '.join(BALANCES)}")
    changes: dict[str, object] = {"kd_balance": name}
    try:
        if name == "fixed" and rest and "=" not in rest.split(",")[0]:
            weight, _, rest = rest.partition(",")
            changes = {
                "kd_balance": "none",
                "task_loss_weight": float(weight),
                "distill_loss_weight": round(1 - float(weight), 12),
            }
        for pair in filter(None, rest.split(",")):
            key, _, value = pair.partition("=")
            option, kind = _OPTIONS[key]
            changes[option] = kind(value)
    except (KeyError, ValueError):
        raise UsageError(
            f"--balances: {text!r}; expected fixed:WEIGHT or NAME:key=value,... with {', '.join(_OPTIONS)}"
        ) from None
    return changes


def run_path(folder: Path, balance: str, seed: int) -> Path:
    """The directory of one run."""
    return folder / re.sub(r"[^\w.=-]+", "_", balance) / f"seed-{seed}"


def _finished(path: Path, epochs: int) -> bool:
    """Whether a run of that many epochs was trained to its end."""
    file = path / "finished"
    return file.exists() and file.read_text(encoding="utf-8").strip() == str(epochs)


def _last(path: Path, column: str) -> float:
    """Of the last epoch: the best one would be chosen on the split that judges."""
    return float(read_rows(path / "summary.csv")[-1][column])


@dataclass(frozen=True)
class Line:
    """One balance over the seeds.

    Attributes:
        balance: its text.
        mean, deviation: over the seeds; the sample standard deviation, NaN for one seed.
        difference, error: to the best fixed weights, seed by seed: mean, and its standard error; NaN without these.
        won: seeds in which it is better; -1 without fixed weights.
        reference: whether it is these best fixed weights.
    """

    balance: str
    mean: float
    deviation: float
    difference: float
    error: float
    won: int
    reference: bool


def compare(results: Mapping[str, Sequence[float]], lower: bool = False) -> list[Line]:
    """Each balance against the fixed weights with the best mean.

    Args:
        results: by balance, one number per seed, the same seeds in the same order.
        lower: smaller is better.

    Returns:
        A line per balance, the best mean first.
    """
    sign = -1.0 if lower else 1.0
    means = {text: fmean(values) for text, values in results.items()}
    fixed = [text for text in results if text.startswith("fixed")]
    best = max(fixed, key=lambda text: sign * means[text]) if fixed else None
    lines = []
    for text, values in results.items():
        differences = [] if best is None else [a - b for a, b in zip(values, results[best], strict=True)]
        several = len(values) > 1
        lines.append(
            Line(
                text,
                means[text],
                stdev(values) if several else math.nan,
                fmean(differences) if differences else math.nan,
                stdev(differences) / math.sqrt(len(differences)) if several and differences else math.nan,
                sum(sign * d > 0 for d in differences) if differences else -1,
                text == best,
            )
        )
    return sorted(lines, key=lambda line: -sign * line.mean)


def markdown(lines: Sequence[Line], metric: str, seeds: Sequence[int], epochs: int) -> str:
    """The table, with what its numbers are."""
    reference = next((line.balance for line in lines if line.reference), None)
    text = [
        f"{metric} of the validation split after {epochs} epochs; seeds {', '.join(map(str, seeds))}: mean and sample "
        "standard deviation.",
        "",
    ]
    if reference is None:
        text += [f"| balance | {metric} |", "|---|---|"]
        return "\n".join([*text, *(f"| {line.balance} | {_with(line.mean, line.deviation)} |" for line in lines), ""])
    text[0] += (
        f" Difference to `{reference}`, the best of the fixed weights on this same split (which favours it), seed by "
        "seed: mean and its standard error, and the seeds that are better."
    )
    text += [f"| balance | {metric} | difference | better |", "|---|---|---|---|"]
    for line in lines:
        difference = "reference" if line.reference else _with(line.difference, line.error, sign="+")
        better = "" if line.reference else f"{line.won}/{len(seeds)}"
        text.append(f"| {line.balance} | {_with(line.mean, line.deviation)} | {difference} | {better} |")
    return "\n".join([*text, ""])


def _with(value: float, spread: float, sign: str = "") -> str:
    return f"{value:{sign}.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}")
