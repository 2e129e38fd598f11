"""`dtokd export`: a run's student for other programs, compared with the model itself on the run's validation images."""

from __future__ import annotations

import argparse
import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from .card import CARD
from .errors import UsageError, reason_of
from .files import as_json, write_bytes, write_text, writing
from .readme import make_readme
from .train import data
from .trained import STUDENT, Trained, load_trained

#: Packages that `--format onnx` needs, which are no part of torch.
ONNX = ("onnx", "onnxscript", "onnxruntime")
#: Weights in a folder of timm's hub.
WEIGHTS = "model.safetensors"

#: What `--format torch` and `onnx` return, by kind of model.
OUTPUTS = {False: ["logits"], True: ["scores", "boxes"]}

#: From images [B, channels, H, W] to one or several outputs.
Model = Callable[[Tensor], Any]


class AllPredictions(nn.Module):
    """A detector without its choice of boxes, whose number depends on the image: for formats that hold tensors only.

    Args:
        detector: a `detect.detectors.base.Detector`.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """From [B, 3, H, W] in [0, 1] to scores [B, N, classes], and boxes [B, N, 4] x0 y0 x1 y1 in pixels."""
        from .detect.batch import Images

        # one size for all: their number is not known when the program is made
        size = (images.shape[2], images.shape[3])
        given = Images(images, torch.ones_like(images[:, 0], dtype=torch.bool), [size])
        scores, boxes = self.detector.decode(self.detector.observe(given), given)
        return scores, boxes


def run(options: argparse.Namespace) -> int:
    """Export, compare, and print one line of JSON: format, path, input, images, largest difference and tolerance.

    Args:
        options: of `dtokd export`.

    Raises:
        UsageError: no such run or data, a package is missing, the format cannot hold the model, or the outputs differ
            by more than the tolerance: the files are then removed.
    """
    if options.format == "onnx":
        _check_installed()
    trained = load_trained(options.run_dir, "dtokd export", options.checkpoint)
    if trained.detects and options.format == "timm":
        raise UsageError(
            f"--format timm: {options.run_dir} holds a detector, which timm does not load; pass --format torch or onnx"
        )
    model = AllPredictions(trained.model).eval() if trained.detects else trained.model
    input = _validation_images(trained, options)
    if len(input) == 1:  # an export of one image may take their number for a constant
        input = input.repeat(2, 1, 1, 1)
    target = options.output or options.run_dir / "export" / options.format
    with writing(target, "--output"):
        target.mkdir(parents=True, exist_ok=True)
        if options.format == "timm":
            made = _timm(trained, target)
        else:
            made = (_torch if options.format == "torch" else _onnx)(trained, model, target, input)
    difference = _difference(model, made, [input, input[:1]])
    result = {
        "format": options.format,
        "path": str(target),
        "input": list(input.shape[1:]),
        "images": len(input),
        "largest_difference": difference,
        "tolerance": options.tolerance,
    }
    if not difference <= options.tolerance:  # NaN too
        for file in target.glob("*"):
            if file.suffix in (".pt2", ".onnx", ".data", ".safetensors"):
                file.unlink()
        raise UsageError(
            f"--tolerance: {options.tolerance:g}, but the exported model differs from the run's by {difference:.3g} of "
            f"the largest output on {len(input)} validation images; the files were removed; pass a larger one, or "
            "another --format"
        )
    print(as_json(result))
    return 0


def _check_installed() -> None:
    missing = []
    for name in ONNX:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UsageError(
            f"--format onnx: {', '.join(missing)} cannot be imported; pip install 'dtokd-kernels[onnx]', or pass "
            "--format torch"
        )


def _validation_images(trained: Trained, options: argparse.Namespace) -> Tensor:
    """The first images of the run's validation split, as it was judged by them; of a detector padded to one size.

    Raises:
        UsageError: the data is not there, or the run had no validation split.
    """
    settings = trained.settings
    if options.data_dir is not None:
        settings.data_dir = options.data_dir
    if not settings.val_split:
        raise UsageError("dtokd export: the run was trained with --val-split '', so it has no images to compare on")
    settings.workers, settings.pin_mem = 0, False
    settings.batch_size = settings.validation_batch_size = options.images
    cpu = torch.device("cpu")
    if trained.detects:
        from .detect.data import make_loader, read_split

        split = read_split(settings, settings.val_split)
        batches: Any = make_loader(settings, split, settings.val_split, training=False, device=cpu)
        pixels: Tensor = next(iter(batches))[0].pixels
        return pixels
    settings.dataset_download = False
    cfg = trained.model.pretrained_cfg
    config = {name: cfg[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}
    images = data.open_dataset(settings, settings.val_split)
    input: Tensor = next(iter(data.validation_loader(settings, images, config, cpu)))[0]
    return input


@torch.no_grad()
def _difference(model: Model, made: Model, batches: Sequence[Tensor]) -> float:
    """The largest difference of any output, in parts of the largest value of that output; NaN for other shapes."""
    worst = 0.0
    for input in batches:
        for got, expected in zip(_several(made(input)), _several(model(input)), strict=True):
            if got.shape != expected.shape:
                return float("nan")
            difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
            worst = difference if math.isnan(difference) else max(worst, difference)
            if math.isnan(worst):
                return worst
    return worst


def _several(output: Any) -> list[Tensor]:
    return list(output) if isinstance(output, (tuple, list)) else [output]


def _timm(trained: Trained, target: Path) -> Model:
    """A folder as timm's hub has it: `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it."""
    write_text(target / CARD, as_json(trained.card, indent=2) + "\n")
    write_bytes(target / WEIGHTS, save(dict(trained.model.state_dict()), {"format": "pt"}))
    write_text(
        target / "README.md", make_readme(trained.run, folder=True, best=trained.weights == trained.run / STUDENT)
    )
    try:
        made: Model = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
        return made
    except Exception as error:  # what timm and its models raise is of every kind
        raise UsageError(f"--format timm: timm does not load {target}: {reason_of(error)}") from error


def _program(trained: Trained, model: Any, images: Tensor, format: str) -> Any:
    batch = torch.export.Dim("batch", min=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's and the model's inside
            return torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    except Exception as error:  # of dynamo, of every kind
        raise UsageError(
            f"--format {format}: torch.export cannot express {trained.card['architecture']}: {reason_of(error)}; "
            "student.safetensors of the run holds the weights, which dtokd predict uses"
        ) from error


def _torch(trained: Trained, model: Any, target: Path, images: Tensor) -> Model:
    """`torch.export.load("student.pt2").module()` is the model; any number of images at a time."""
    file = target / "student.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(_program(trained, model, images, "torch"), file)
        made: Model = torch.export.load(file).module()
        return made


def _onnx(trained: Trained, model: Any, target: Path, images: Tensor) -> Model:
    """Input "images" [batch, channels, H, W] float32, outputs `OUTPUTS`."""
    import onnxruntime

    file = target / "student.onnx"
    program = _program(trained, model, images, "onnx")
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            made: Any = torch.onnx.export(
                program,
                input_names=["images"],
                output_names=OUTPUTS[trained.detects],
                dynamo=True,
                verbose=False,
                external_data=False,
            )
            made.save(str(file))
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxscript and onnxruntime, of every kind
        raise UsageError(
            f"--format onnx: {trained.card['architecture']} cannot be expressed: {reason_of(error)}; pass "
            "--format torch"
        ) from error
    return lambda input: [torch.from_numpy(x) for x in session.run(None, {"images": input.numpy()})]
