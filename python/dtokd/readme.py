"""The model card of a run, `README.md`: what was trained from what, how good it is, and how it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import UsageError
from .files import write_text
from .metric import best_of, is_lower_better
from .report.columns import read_columns
from .settings import settings_of
from .texts import parse_json
from .train.about import read_about
from .train.options import flag

README = "README.md"


def make_readme(run: Path, folder: bool = False) -> str:
    """The text.

    Args:
        run: the directory of a run of `dtokd train` or `dtokd detect`, with a finished epoch.
        folder: whether it is for a folder of `dtokd export --format timm` instead of the run's directory.

    Raises:
        UsageError: it is no run directory, or a file of it is damaged.
    """
    settings = settings_of(run, "dtokd export")
    epochs = read_columns(run / "summary.csv", ("epoch",))
    about = read_about(run)
    try:
        card = parse_json((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{run / 'config.json'} cannot be read: {error}") from error
    detects = "annotations" in settings
    lines = [
        "---",
        "tags:",
        f"- {'object-detection' if detects else 'image-classification'}",
        "- knowledge-distillation",
        *([] if detects else ["library_name: timm"]),
        "---",
        f"# {run.name}",
        "",
        _what(settings),
        "",
        *_results(settings, epochs, about),
        "## Training",
        "",
        *_training(settings, about, len(epochs.get("epoch", ()))),
        "",
        "## Input and classes",
        "",
        *_input(card),
        "",
        "## Loading",
        "",
        *_loading(run, card, detects, folder),
    ]
    return "\n".join(lines) + "\n"


def write_readme(run: Path) -> Path:
    """Write the card of a run into its directory: see `make_readme`."""
    write_text(run / README, make_readme(run))
    return run / README


def _several(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []


def _what(settings: Mapping[str, Any]) -> str:
    what = f"A {'detector' if 'annotations' in settings else 'classifier'}, `{settings['model']}`"
    teachers = _several(settings.get("kd_model_name"))
    if not teachers:
        return f"{what}, trained without a teacher by `dtokd {'detect' if 'annotations' in settings else 'train'}`."
    names = " and ".join(f"`{name}`" for name in teachers)
    kinds = ", ".join(_several(settings.get("kd_distill_type")))
    return (
        f"{what}, distilled from {names} ({kinds}; weights of the losses: `--kd-balance {settings['kd_balance']}`) by "
        f"`dtokd {'detect' if 'annotations' in settings else 'train'}`."
    )


def _results(settings: Mapping[str, Any], epochs: Mapping[str, list[float]], about: Mapping[str, Any]) -> Iterator[str]:
    prefix = "eval_ema_" if settings.get("model_ema") else "eval_"
    found = {name.removeprefix(prefix): values for name, values in epochs.items() if name.startswith(prefix)}
    found = {name: values for name, values in found.items() if not name.startswith(("error_", "ema_"))}
    metric = settings["eval_metric"]
    if metric not in found:
        return
    best = best_of(found[metric], is_lower_better(metric))
    teachers = [t for t in about.get("teachers", ()) if t.get("metrics")]
    yield f"## Results on `{settings['val_split']}`"
    yield ""
    yield "| | student |" + "".join(f" teacher {t['name']} |" for t in teachers)
    yield "|---|---|" + "---|" * len(teachers)
    for name, values in found.items():
        cells = [f"{values[best]:.4g}", *(_number(t["metrics"].get(name)) for t in teachers)]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    yield f"The student is that of epoch {epochs['epoch'][best] + 1:.0f}, the best by {metric} on these images."
    yield ""


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def _training(settings: Mapping[str, Any], about: Mapping[str, Any], epochs: int) -> Iterator[str]:
    for line in about.get("data", ()):
        yield f"- data: {line}"
    for part in [about.get("student"), *about.get("teachers", ())]:
        if part:
            yield f"- {'student' if part is about.get('student') else 'teacher'} {part['told']}"
    chosen = ("opt", "lr", "weight_decay", "sched", "batch_size", "epochs", "seed")
    yield "- " + ", ".join(f"`{flag(key)} {settings[key]}`" for key in chosen if settings.get(key) is not None)
    yield f"- {epochs} of {settings['epochs']} epochs are finished; `args.yaml` of the run has all options"


def _input(card: Mapping[str, Any]) -> Iterator[str]:
    cfg = card.get("pretrained_cfg") or card.get("input") or {}
    keys = ("input_size", "img_size", "max_size", "square", "interpolation", "crop_pct", "mean", "std")
    yield "- " + ", ".join(f"{key} {cfg[key]}" for key in keys if key in cfg)
    names = [str(name) for name in card.get("label_names") or ()]
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    yield f"- {card['num_classes']} classes" + (f": {shown}" if names else "")


def _loading(run: Path, card: Mapping[str, Any], detects: bool, folder: bool) -> Iterator[str]:
    if detects:
        yield f"    dtokd predict {run.name} IMAGES"
        return
    source = "local-dir:FOLDER" if folder else f"local-dir:{run.name}"
    weights = "pretrained=True" if folder else f'checkpoint_path="{run.name}/student.safetensors"'
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
