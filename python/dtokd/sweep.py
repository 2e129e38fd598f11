"""`dtokd sweep`: seeds x balances on one configuration, a table, and a paired comparison with the best fixed ones."""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from . import identity
from .errors import Diverged, UsageError
from .files import as_json, write_text
from .metric import is_lower_better, rank
from .objectives.teacher import as_list
from .train import data
from .train.options import BALANCES, OUTSIDE, add_arguments, plain, read_value
from .train.progress import Progress
from .train.run import train
from .train.rundir import environment, read_rows, write_rows
from .values import FRACTION

#: What may follow a balance's colon, and the option it sets.
_OPTIONS = {
    "rescale": "kd_balance_rescale",
    "params": "kd_balance_params",
    "gram": "kd_balance_gram",
    "opt": "opt",
    "lr": "lr",
    "temperature": "kd_temperature",
}


def run(options: argparse.Namespace) -> int:
    """Train what is not yet trained with these options, data, files and versions; write sweep.csv and sweep.md.

    Args:
        options: of `train.options`, with `seeds` and `balances`.

    Returns:
        0, or 128 and the number of the signal that ended it.

    Raises:
        UsageError: as `train`, or a balance that cannot be read.
        Diverged: runs have; the others are trained, but there is no table.
    """
    folder = options.output / (options.experiment or "sweep")
    settings = {text: parse_balance(text) for text in options.balances}
    if not options.val_split:
        raise UsageError("--val-split: empty, but the sweep compares evaluations; name a split")
    progress = Progress(options.epochs)
    data_sets = _data_sets(options)
    paths: dict[str, list[Path]] = {text: [] for text in settings}
    diverged: list[str] = []
    for text, changes in settings.items():
        for seed in options.seeds:
            own = argparse.Namespace(**{**vars(options), **changes, "seed": seed, "resume": "auto"})
            del own.seeds, own.balances
            if own.kd_balance == "none":  # a weighted sum is for the optimizer that ours stands for
                own.opt = own.opt.lower().removeprefix("dto")
            told = depends_on(own, data_sets)
            path = run_path(folder, text, seed, told)
            paths[text].append(path)
            if _finished(path, told):
                continue
            own.output, own.experiment = path.parent, path.name
            try:
                outcome = train(own, progress)
            except Diverged as error:  # the others go on
                progress.say(f"{text}, seed {seed}: {error}")
                diverged.append(f"{text} with seed {seed}")
                continue
            if outcome.interrupted:
                return 128 + outcome.interrupted
            write_text(path / "finished.json", told)
    if diverged:
        raise Diverged(
            f"--balances: {', '.join(diverged)} diverged; leave it out, or lower its lr; the others are kept"
        )
    metric = ("ema_" if options.model_ema else "") + options.eval_metric
    results = {text: [_last(path, f"eval_{metric}") for path in several] for text, several in paths.items()}
    rows = compare(results, lower=is_lower_better(metric))
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
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    actions = {action.dest: action for action in parser._actions}
    try:
        if name == "fixed" and rest and "=" not in rest.split(",")[0]:
            text_of_weight, _, rest = rest.partition(",")
            weight = FRACTION(text_of_weight)
            changes = {
                "kd_balance": "none",
                "task_loss_weight": weight,
                "distill_loss_weight": round(1 - weight, 12),
            }
        for pair in filter(None, rest.split(",")):
            key, _, value = pair.partition("=")
            option = _OPTIONS[key]
            changes[option] = read_value(actions[option], value, f"--balances: {text!r}: {key}")
    except (KeyError, argparse.ArgumentTypeError):
        raise UsageError(
            f"--balances: {text!r}; expected fixed:WEIGHT, of 0 to 1, or NAME:key=value,... with {', '.join(_OPTIONS)}"
        ) from None
    return changes


#: Options whose files count by their contents.
_FILES = ("class_map", "initial_checkpoint", "kd_teacher_path")
#: Options that name models, which may be in a directory.
_MODELS = ("model", "kd_model_name")


def depends_on(options: argparse.Namespace, data_sets: Mapping[str, str]) -> str:
    """All that the result of a run depends on, as JSON.

    Args:
        options: of `train.options`.
        data_sets: of each split what `identity.of_dataset` tells.
    """
    places = (*OUTSIDE, "data_dir", "kd_cache_teacher")  # it is the contents that count
    told = {key: value for key, value in plain(options).items() if key not in places}
    files = {}
    for key in _FILES:
        files[key] = [identity.of_path(Path(path)) for path in as_list(told.get(key) or None)]
    for key in _MODELS:
        folders = [name.partition(":")[2] for name in as_list(told.get(key)) if name.lower().startswith("local-dir:")]
        files[key] = [identity.of_path(Path(folder)) for folder in folders]
    machine = {key: value for key, value in environment(options).items() if key not in ("cores", "threads")}
    return as_json({"options": told, "data": data_sets, "files": files, "environment": machine}, indent=1) + "\n"


def _data_sets(options: argparse.Namespace) -> dict[str, str]:
    """Raises UsageError: as `data.open_dataset`."""
    found = {}
    for split in (options.train_split, options.val_split):
        told = identity.of_dataset(data.open_dataset(options, split))
        if told is None and options.data_dir is not None:
            told = identity.of_folder(options.data_dir)
        found[split] = told or uuid.uuid4().hex  # not known: no result is found again
    return found


def run_path(folder: Path, balance: str, seed: int, told: str) -> Path:
    """The directory of one run, of which `told` is what it depends on."""
    digest = hashlib.sha256(told.encode()).hexdigest()[:8]
    return folder / re.sub(r"[^\w.=-]+", "_", balance) / f"seed-{seed}-{digest}"


def _finished(path: Path, told: str) -> bool:
    """Whether a run that depends on just this was trained to its end."""
    file = path / "finished.json"
    return file.exists() and file.read_text(encoding="utf-8") == told


def _last(path: Path, column: str) -> float:
    """Of the last epoch: the best one would be chosen on the split that judges."""
    return float(read_rows(path / "summary.csv")[-1][column])


@dataclass(frozen=True)
class Line:
    """One balance over the seeds.

    Attributes:
        balance: its text.
        mean, deviation: over the seeds; the sample standard deviation, NaN for one seed or where a seed gave NaN.
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
    """Each balance against the fixed weights with the best mean; a mean of NaN is the worst.

    Args:
        results: by balance, one number per seed, the same seeds in the same order.
        lower: smaller is better.

    Returns:
        A line per balance, the best mean first.
    """
    means = {text: fmean(values) for text, values in results.items()}
    fixed = [text for text in results if text.startswith("fixed")]
    best = max(fixed, key=lambda text: rank(means[text], lower)) if fixed else None
    lines = []
    for text, values in results.items():
        pairs = [] if best is None else list(zip(values, results[best], strict=True))
        differences = [a - b for a, b in pairs]
        lines.append(
            Line(
                text,
                means[text],
                _deviation(values),
                fmean(differences) if differences else math.nan,
                _deviation(differences) / math.sqrt(len(values)),
                sum(rank(a, lower) > rank(b, lower) for a, b in pairs) if pairs else -1,
                text == best,
            )
        )
    return sorted(lines, key=lambda line: -rank(line.mean, lower))


def _deviation(values: Sequence[float]) -> float:
    """Of a sample; NaN where it has none."""
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


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
