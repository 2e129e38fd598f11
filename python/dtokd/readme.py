"""The model card of a run, `README.md`: what was trained from what, how good it is, and how it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .card import read_card
from .files import write_text
from .report.recorded import Recorded, listed, metric_of
from .train.options import flag

README = "README.md"


def make_readme(path: Path, folder: bool = False, best: bool = True) -> str:
    """The text.

    Args:
        path: the directory of a run of `dtokd train` or `dtokd detect`, with a finished epoch.
        folder: whether it is for a folder of `dtokd export --format timm` instead of the run's directory.
        best: whether the weights are those of the best epoch, whose results are known.

    Raises:
        UsageError: it is no run directory, no epoch is finished, or a file of it is damaged.
    """
    run = Recorded.read(path, "dtokd export")
    detects = "annotations" in run.settings
    card = read_card(path, "dtokd export", detects)
    lines = [
        "---",
        "tags:",
        f"- {'object-detection' if detects else 'image-classification'}",
        "- knowledge-distillation",
        *([] if detects else ["library_name: timm"]),
        "---",
        f"# {run.name}",
        "",
        _what(run.settings, detects),
        "",
        *(_results(run) if best else ()),
        "## Training",
        "",
        *_training(run),
        "",
        "## Input and classes",
        "",
        *_input(card),
        "",
        "## Loading",
        "",
        *_loading(run.name, card, detects, folder),
    ]
    return "\n".join(lines) + "\n"


def write_readme(run: Path) -> None:
    """Write the card of a run into its directory: see `make_readme`."""
    write_text(run / README, make_readme(run))


def _what(settings: Mapping[str, Any], detects: bool) -> str:
    kind, by = ("detector", "`dtokd detect`") if detects else ("classifier", "`dtokd train`")
    what = f"A {kind}, `{settings['model']}`"
    if not (teachers := listed(settings.get("kd_model_name"))):
        return f"{what}, trained without a teacher by {by}."
    names = " and ".join(f"`{name}`" for name in teachers)
    kinds = ", ".join(listed(settings.get("kd_distill_type")))
    balance = f"weights of the losses: `--kd-balance {settings['kd_balance']}`"
    return f"{what}, distilled from {names} ({kinds}; {balance}) by {by}."


def _results(run: Recorded) -> Iterator[str]:
    named = {n.removeprefix(run.prefix): values for n, values in run.epochs.items() if n.startswith(run.prefix)}
    found = {name: values for name, values in named.items() if not name.startswith(("error_", "ema_"))}
    if run.metric not in found:
        return
    best, _ = run.best()
    teachers = [teacher for teacher in run.teachers if teacher.get("metrics")]
    yield f"## Results on `{run.settings['val_split']}`"
    yield ""
    yield "| | student |" + "".join(f" teacher {t['name']} |" for t in teachers)
    yield "|---|---|" + "---|" * len(teachers)
    for name, values in found.items():
        theirs = ["" if (value := metric_of(t, name)) is None else f"{value:.4g}" for t in teachers]
        yield f"| {' | '.join([name, f'{values[best]:.4g}', *theirs])} |"
    yield ""
    yield f"The student is that of epoch {run.epochs['epoch'][best] + 1:.0f}, the best by {run.metric} on these images."
    yield ""


def _training(run: Recorded) -> Iterator[str]:
    for line in run.about.get("data", ()):
        yield f"- data: {line}"
    for part in run.models:
        yield f"- {'student' if part is run.about.get('student') else 'teacher'} {part['told']}"
    chosen, settings = ("opt", "lr", "weight_decay", "sched", "batch_size", "epochs", "seed"), run.settings
    yield "- " + ", ".join(f"`{flag(key)} {settings[key]}`" for key in chosen if settings.get(key) is not None)
    done = f"{len(run.epochs['epoch'])} of {settings['epochs']} epochs are finished"
    yield f"- {done}; `args.yaml` of the run has all options"


def _input(card: Mapping[str, Any]) -> Iterator[str]:
    cfg = card.get("pretrained_cfg") or card.get("input") or {}
    keys = ("input_size", "img_size", "max_size", "square", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    yield "- " + ", ".join(f"{key} {cfg[key]}" for key in keys if key in cfg)
    names = [str(name) for name in card.get("label_names") or ()]
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    yield f"- {card['num_classes']} classes" + (f": {shown}" if names else "")


def _loading(run: str, card: Mapping[str, Any], detects: bool, folder: bool) -> Iterator[str]:
    if detects:
        yield f"    dtokd predict {run} IMAGES"
        return
    source = "local-dir:FOLDER" if folder else f"local-dir:{run}"
    weights = "pretrained=True" if folder else f'checkpoint_path="{run}/student.safetensors"'
    yield "```python"
    yield "import timm"
    yield "from timm.data import create_transform, resolve_data_config"
    yield ""
    if card["architecture"].startswith("cifar_"):
        yield "import dtokd.networks  # registers the architecture with timm"
        yield ""
    yield f'model = timm.create_model("{source}", {weights}).eval()'
    yield "transform = create_transform(**resolve_data_config(model=model))"
    yield "```"
