"""`dtokd export`: a run's student for other programs, compared with the model itself on the run's validation images."""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor

from .card import CARD
from .errors import UsageError, reason_of
from .files import as_json, write_bytes, write_text, writing
from .readme import make_readme
from .train import data
from .trained import Trained, load_trained

#: Packages that `--format onnx` needs, which are no part of torch.
ONNX = ("onnx", "onnxscript", "onnxruntime")
#: Weights in a folder of timm's hub.
WEIGHTS = "model.safetensors"

#: From images [B, channels, H, W] to logits [B, classes].
Model = Callable[[Tensor], Tensor]


def run(options: argparse.Namespace) -> int:
    """Export, compare, and print one line of JSON: format, path, images, largest difference and tolerance.

    Args:
        options: of `dtokd export`.

    Raises:
        UsageError: no such run or data, a package is missing, the format cannot hold the model, or the outputs differ
            by more than the tolerance: the files are then removed.
    """
    if options.format == "onnx":
        _check_installed()
    trained = load_trained(options.run_dir, "dtokd export", options.checkpoint)
    if trained.detects:
        raise UsageError(
            f"dtokd export: {options.run_dir} holds a detector, which these formats cannot hold yet; "
            "dtokd predict finds boxes, and student.safetensors holds the weights"
        )
    batches = _validation_images(trained, options)
    target = options.output or options.run_dir / "export" / options.format
    with writing(target, "--output"):
        target.mkdir(parents=True, exist_ok=True)
        made = {"timm": _timm, "torch": _torch, "onnx": _onnx}[options.format](trained, target, batches[0])
    difference, count = _difference(trained.model, made, batches)
    result = {
        "format": options.format,
        "path": str(target),
        "images": count,
        "largest_difference": difference,
        "tolerance": options.tolerance,
    }
    if not difference <= options.tolerance:  # NaN too
        for file in target.glob("*"):
            if file.suffix in (".pt2", ".onnx", ".data", ".safetensors"):
                file.unlink()
        raise UsageError(
            f"--tolerance: {options.tolerance:g}, but the exported model differs from the run's by {difference:.3g} of "
            f"the largest output on {count} validation images; the files were removed; pass a larger one, or another "
            "--format"
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


def _validation_images(trained: Trained, options: argparse.Namespace) -> list[Tensor]:
    """The first images of the run's validation split, as it was judged by them: batches of several sizes.

    Raises:
        UsageError: the data is not there, or the run had no validation split.
    """
    settings = trained.settings
    if options.data_dir is not None:
        settings.data_dir = options.data_dir
    if not settings.val_split:
        raise UsageError("dtokd export: the run was trained with --val-split '', so it has no images to compare on")
    settings.dataset_download, settings.workers, settings.pin_mem = False, 0, False
    settings.batch_size, settings.validation_batch_size = options.images, options.images
    cfg = trained.model.pretrained_cfg
    config = {name: cfg[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct")}
    images = data.open_dataset(settings, settings.val_split)
    input, _ = next(iter(data.validation_loader(settings, images, config, torch.device("cpu"))))
    if len(input) == 1:  # an export of one image may take it for a constant
        input = input.repeat(2, 1, 1, 1)
    return [input, input[:1]]


@torch.no_grad()
def _difference(model: Any, made: Model, batches: Sequence[Tensor]) -> tuple[float, int]:
    """The largest difference of the outputs, in parts of the largest output; over all batches, and their images."""
    worst = 0.0
    for input in batches:
        expected, got = _logits(model(input)), made(input)
        if got.shape != expected.shape:
            return float("nan"), len(batches[0])
        difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        worst = difference if difference != difference else max(worst, difference)
    return worst, len(batches[0])


def _logits(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return first


def _timm(trained: Trained, target: Path, images: Tensor) -> Model:
    """A folder as timm's hub has it: `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it."""
    write_text(target / CARD, as_json(trained.card, indent=2) + "\n")
    write_bytes(target / WEIGHTS, save(dict(trained.model.state_dict()), {"format": "pt"}))
    write_text(target / "README.md", make_readme(trained.run, folder=True))
    try:
        return _first(timm.create_model(f"local-dir:{target}", pretrained=True).eval())
    except Exception as error:  # what timm and its models raise is of every kind
        raise UsageError(f"--format timm: timm does not load {target}: {reason_of(error)}") from error


def _first(model: Any) -> Model:
    return lambda input: _logits(model(input))


def _program(trained: Trained, images: Tensor, format: str) -> Any:
    batch = torch.export.Dim("batch", min=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's and the model's inside
            return torch.export.export(trained.model, (images,), dynamic_shapes=({0: batch},))
    except Exception as error:  # of dynamo, of every kind
        raise UsageError(
            f"--format {format}: torch.export cannot express {trained.card['architecture']}: {reason_of(error)}; "
            "pass --format timm, which keeps it as it is"
        ) from error


def _torch(trained: Trained, target: Path, images: Tensor) -> Model:
    """`torch.export.load("student.pt2").module()` is the model; any number of images at a time."""
    file = target / "student.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(_program(trained, images, "torch"), file)
        return _first(torch.export.load(file).module())


def _onnx(trained: Trained, target: Path, images: Tensor) -> Model:
    """Input "images" [batch, channels, H, W] float32, output "logits" [batch, classes]."""
    import onnxruntime

    file = target / "student.onnx"
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                _program(trained, images, "onnx"),
                input_names=["images"],
                output_names=["logits"],
                dynamo=True,
                verbose=False,
                external_data=False,
            )
            program.save(str(file))
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except UsageError:
        raise
    except Exception as error:  # of onnxscript and onnxruntime, of every kind
        raise UsageError(
            f"--format onnx: {trained.card['architecture']} cannot be expressed: {reason_of(error)}; pass "
            "--format torch"
        ) from error
    (name,) = [each.name for each in session.get_inputs()]
    return lambda input: torch.from_numpy(session.run(None, {name: input.numpy()})[0])
