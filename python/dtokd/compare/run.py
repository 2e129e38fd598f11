"""`dtokd compare`: train what is not yet trained, then judge it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median

from ..errors import Diverged
from ..evaluate import measure
from ..files import as_json, write_text
from ..metric import chosen_by
from ..train.progress import Progress
from ..train.rundir import RunDir, write_rows
from . import processes
from .arms import flags_of
from .page import write_page
from .plan import Plan, Result, Run
from .verdict import Arm, Setting, as_data, as_markdown, judge


def run(options: argparse.Namespace) -> int:
    """Train what is not yet trained with these settings; write the verdict, in words and numbers, and a report.

    Args:
        options: of `compare.options`.

    Returns:
        0; 1 if runs have diverged so that there is no verdict; or 128 and the number of the signal that ended it.

    Raises:
        UsageError: as `train`, or see `Plan`; or the folder holds another comparison.
    """
    plan = Plan(options)
    progress = Progress(plan.options.epochs)
    plan.check()
    devices = processes.gpus(options)
    jobs = options.jobs or max(1, len(devices))
    if any(Result.read(run) is None for run in plan.runs()):
        plan.try_models()
    if options.dry_run:
        progress.say(_preview(plan, jobs))
        return 0
    with RunDir(plan.folder).locked():
        plan.check()
        plan.begin()
        signal = _train(plan, jobs, devices, progress)
        if signal:
            progress.say("stopped: the finished runs are kept, and the same command goes on")
            return 128 + signal
        runs = list(plan.runs())
        setting = Setting(
            chosen_by(plan.options),
            plan.seeds,
            plan.options.epochs,
            options.epochs,
            plan.options.val_split,
            plan.judges,
            plan.images,
            max(result.jobs for run in runs if (result := Result.read(run)) is not None),
            plan.options.kd_cache_views if plan.options.kd_cache_teacher else 0,
        )
        verdict = judge([_arm(text, plan, runs) for text in plan.arms], setting)
        text = as_markdown(verdict, setting)
        write_text(plan.folder / "compare.md", text)
        write_text(plan.folder / "compare.json", as_json(as_data(verdict, setting), indent=1) + "\n")
        write_rows(plan.folder / "compare.csv", [_row(run, setting) for run in runs])
        page = write_page(plan.folder, verdict, setting, runs)
    progress.say(text)
    progress.say(f"curves side by side: {page}")
    return 1 if verdict.kind == "none" else 0


def _train(plan: Plan, jobs: int, devices: Sequence[str], progress: Progress) -> int:
    runs = list(plan.runs())
    left = [run for run in runs if Result.read(run) is None]
    first = left[0] if left else None
    finished = len(runs) - len(left)

    def done(run: Run, diverged: Diverged | None) -> None:
        nonlocal finished
        result = replace(_result(run, plan, diverged), jobs=jobs)
        result.write(run)
        finished += 1
        told = f"has diverged: {diverged}" if diverged else f"{chosen_by(plan.options)} {result.judged:.4g}"
        time_left = _time_left(runs, jobs)
        progress.say(f"{run.arm}, seed {run.seed}: {told}; {finished} of {len(runs)} runs are finished{time_left}")

    if left and jobs > 1:
        progress.say(f"{len(left)} runs, {jobs} at a time; {processes.log_of(left[0])} is what the first one prints")
        return processes.train_in_processes(left, jobs, devices, done)
    for each in left:
        if each is not first:
            progress.say(f"{each.arm}, seed {each.seed}")
        progress.epochs = plan.options.epochs
        try:
            outcome = plan.kind.train(argparse.Namespace(**vars(each.options)), progress)
        except Diverged as error:  # the others go on
            done(each, error)
            continue
        if outcome.interrupted:
            return outcome.interrupted
        done(each, None)
    return 0


def _result(run: Run, plan: Plan, diverged: Diverged | None) -> Result:
    columns = run.columns
    seconds = math.fsum(columns.get("seconds", ()))
    if diverged is not None:
        return Result(math.nan, math.nan, seconds, str(diverged))
    # the last epoch's: the best one would be chosen on the split that judges
    chosen = columns.get(f"eval_{chosen_by(plan.options)}", [math.nan])[-1]
    if plan.judges == plan.options.val_split:
        return Result(chosen, chosen, seconds)
    weights = run.path / "student-last.safetensors"
    own = {"run_dir": run.path, "checkpoint": weights, "val_split": plan.judges, "data_dir": run.options.data_dir}
    judged = measure(argparse.Namespace(**own, device=run.options.device), vars(run.options))
    return Result(chosen, float(judged[plan.options.eval_metric]), seconds)


def _arm(text: str, plan: Plan, runs: Sequence[Run]) -> Arm:
    own = [run for run in runs if run.arm == text]
    results = [result for run in own if (result := Result.read(run)) is not None]
    failed = [
        run.seed
        for run, result in zip(own, results, strict=True)
        if not (math.isfinite(result.chosen) and math.isfinite(result.judged))
    ]
    whole = [run.columns for run in own if run.seed not in failed]
    seconds = [value for columns in whole if math.isfinite(value := _typical(columns.get("iteration_seconds", [])))]
    begins = ("conflict_r", "vertex_r", "share_")
    names = dict.fromkeys(name for columns in whole for name in columns if name.startswith(begins))
    known = {name: [v for columns in whole for v in columns.get(name, ()) if math.isfinite(v)] for name in names}
    return Arm(
        text,
        [result.chosen for result in results],
        [result.judged for result in results],
        flags_of(text, plan.options, plan.arms[text]),
        failed,
        median(seconds) if seconds else math.nan,
        {name: fmean(values) for name, values in known.items() if values},
    )


def _typical(seconds: Sequence[float]) -> float:
    """The median of the epochs after the first, which warms up; NaN if none is known."""
    kept = [value for value in seconds[1:] or seconds if math.isfinite(value)]
    return median(kept) if kept else math.nan


def _preview(plan: Plan, jobs: int) -> str:
    runs = list(plan.runs())
    left = [run for run in runs if Result.read(run) is None]
    text = (
        f"{len(plan.arms)} arms ({', '.join(plan.arms)}) with {len(plan.seeds)} seeds, {plan.options.epochs} epochs "
        f"each: {len(runs)} runs, {len(left)} to train, {jobs} at a time, into {plan.folder}"
    )
    time_left = _time_left(runs, jobs) if left else ""
    return text + (time_left or ("; the time that they take is known once one is finished" if left else ""))


def _time_left(runs: Sequence[Run], jobs: int) -> str:
    """By the mean time of the finished ones."""
    results = [Result.read(run) for run in runs]
    left = results.count(None)
    taken = [result.seconds for result in results if result is not None and result.seconds > 0]
    if not left or not taken:
        return ""
    minutes = left * fmean(taken) / min(jobs, left) / 60
    return f"; about {f'{minutes / 60:.1f} h' if minutes > 90 else f'{math.ceil(minutes)} min'} are left"


def _row(run: Run, setting: Setting) -> dict[str, str]:
    """A run's line in `compare.csv`."""
    result = Result.read(run)
    assert result is not None
    numbers = {f"{setting.metric}_chosen": result.chosen, f"{setting.metric}_judged": result.judged}
    numbers["seconds"] = result.seconds
    written = {name: "" if math.isnan(value) else repr(value) for name, value in numbers.items()}
    return {"arm": run.arm, "seed": str(run.seed), **written, "diverged": result.diverged}
