"""`dtokd predict`: labels with probabilities, or boxes, that a run's student finds in images: JSON and pictures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.data import create_transform
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import UsageError, reason_of
from .files import as_json, write_text, writing
from .train import found as _found  # noqa: F401  makes timm know the formats that Pillow reads
from .train.engine import autocast
from .train.images import convert
from .train.workers import worker_seed
from .train.world import World
from .trained import Trained, load_trained

#: Of a picture of a classified image; smaller ones are enlarged to it.
_SIDE = 224


def run(options: argparse.Namespace) -> int:
    """Predict, print a line of JSON for each image, and write files if `--output` is given.

    Args:
        options: of `dtokd predict`.

    Returns:
        0, or 1 if an image could not be read.

    Raises:
        UsageError: no such run, file or folder; a folder without an image; or images where pictures would be drawn.
    """
    trained = load_trained(options.run_dir, "dtokd predict", options.checkpoint)
    files = list(_files(options.paths))
    drawn = None if options.output is None else _pictures(options.output).resolve()
    if within := [file for file in files if drawn in file.resolve().parents]:
        raise UsageError(
            f"--output: {drawn} is where pictures are drawn, and {len(within)} of the images are in it, such as "
            f"{within[0]}; remove those of an earlier run, or give another folder"
        )
    device = World().device(options.device)
    results = []
    for result in predict(trained, files, device, options):
        results.append(result)
        print(as_json(result), flush=True)
    if options.output is not None:
        with writing(options.output, "--output"):
            write_text(options.output / "predictions.json", as_json(results, indent=2) + "\n")
    bad = [result for result in results if "error" in result]
    if bad:
        first = f"{bad[0]['image']}: {bad[0]['error']}"
        print(f"dtokd predict: {len(bad)} of {len(results)} images cannot be read, such as {first}", file=sys.stderr)
    return int(bool(bad))


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    """Each file as it is named, and the images in each folder and in those below it, in the order of their names.

    Raises:
        UsageError: there is no such path, or a folder has no image.
    """
    for path in paths:
        if path.is_dir():
            endings = get_img_extensions()
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in endings)
            if not inside:
                raise UsageError(f"paths: the folder {path} has no image; known are {', '.join(sorted(endings))}")
            yield from inside
        elif path.exists():
            yield path
        else:
            raise UsageError(f"paths: there is no {path}; pass images, or folders of images")


def _pictures(output: Path) -> Path:
    """Where images with what was found in them go."""
    return output / "pictures"


@torch.inference_mode()
def predict(
    trained: Trained, files: Sequence[Path], device: torch.device, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """What the student finds, image by image.

    Args:
        trained: the student.
        files: the images.
        device: where it computes.
        options: batch_size, workers, top, threshold, and output for pictures.

    Yields:
        {"image": path} and "labels": [{"label", "probability"}], the most probable first; of a detector "width",
        "height" and "detections": [{"label", "category_id", "score", "box"}], where a box is [x0, y0, x1, y1] in the
        image's pixels; "error" for an image that cannot be read.
    """
    model = trained.model.to(device)
    transform = _detector_transform(trained) if trained.detects else _classifier_transform(trained)
    mode = "L" if not trained.detects and trained.input_size[0] == 1 else "RGB"
    loader: DataLoader[Any] = DataLoader(
        _Files(files, mode, trained.detects, transform),
        batch_size=options.batch_size,
        num_workers=options.workers,
        collate_fn=list,
        worker_init_fn=_start_worker if options.workers else None,
    )
    place = 0
    for batch in loader:
        read = [item for item in batch if not isinstance(item, str)]
        with autocast(trained.settings, device):
            outputs = iter(_outputs(trained, model, read, device) if read else ())
        for item in batch:
            result: dict[str, Any] = {"image": str(files[place])}
            if isinstance(item, str):
                result["error"] = item
            else:
                width, height = item[1]
                result |= _told(trained, next(outputs), (width, height), options)
                if options.output is not None:
                    _draw(options.output, files, place, trained, result, mode)
            place += 1
            yield result


class _Files(Dataset[Any]):
    """Pairs of an image [channels, H, W] and its width and height, or the reason why it cannot be read."""

    def __init__(self, files: Sequence[Path], mode: str, upright: bool, transform: Any) -> None:
        self.files, self.mode, self.upright, self.transform = files, mode, upright, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        try:
            image = _read(self.files[index], self.mode, self.upright)
        except Exception as error:  # Pillow raises of every kind
            return reason_of(error)
        return self.transform(image), image.size


def _read(file: Path, mode: str, upright: bool) -> Any:
    """As in training: a classifier's images as they are stored, a detector's turned upright."""
    with Image.open(file) as image:
        return convert(ImageOps.exif_transpose(image) if upright else image, mode)


def _start_worker(number: int) -> None:
    worker_seed(torch.utils.data.get_worker_info())


def _classifier_transform(trained: Trained) -> Any:
    """As `train.data.validation_loader` prepares images, to rounding: it normalises on the device."""
    cfg = trained.model.pretrained_cfg
    kept = {name: cfg[name] for name in ("interpolation", "mean", "std", "crop_pct", "crop_mode")}
    return create_transform(trained.input_size, is_training=False, **kept)


def _detector_transform(trained: Trained) -> Any:
    from .detect.data import make_transforms

    return make_transforms(trained.settings, training=False)


def _outputs(trained: Trained, model: Any, read: Sequence[tuple[Tensor, Any]], device: torch.device) -> list[Any]:
    """Of each image: probabilities [classes], or what `Detections` holds, in the pixels of the resized image."""
    if not trained.detects:
        logits = model(torch.stack([image for image, _ in read]).to(device))
        logits = (logits[0] if isinstance(logits, (tuple, list)) else logits).float()
        return list((logits.sigmoid() if trained.settings.bce_loss else logits.softmax(1)).cpu())
    from .detect.data import collate

    targets = [{"boxes": torch.zeros(0, 4)} for _ in read]
    images, sized = collate([(image, target) for (image, _), target in zip(read, targets, strict=True)])
    found = model(images.to(device)).images
    return [
        {**{name: value.float().cpu() for name, value in each.items()}, "size": target["size"]}
        for each, target in zip(found, sized, strict=True)
    ]


def _told(trained: Trained, output: Any, size: tuple[int, int], options: argparse.Namespace) -> dict[str, Any]:
    names = trained.names
    if not trained.detects:
        top = output.topk(min(options.top, len(names)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return {"labels": [{"label": names[index], "probability": round(value, 6)} for index, value in pairs]}
    width, height = size
    inner_height, inner_width = output["size"]
    scale = torch.tensor([width / inner_width, height / inner_height] * 2)
    most = torch.tensor([width, height] * 2, dtype=torch.float32)
    kept = output["scores"] >= options.threshold
    boxes = (output["boxes"][kept] * scale).clamp(min=0).minimum(most)
    triples = zip(output["labels"][kept].tolist(), output["scores"][kept].tolist(), boxes.tolist(), strict=True)
    return {
        "width": width,
        "height": height,
        "detections": [
            {
                "label": names[int(label)],
                "category_id": trained.card["category_ids"][int(label)],
                "score": round(score, 6),
                "box": [round(x, 2) for x in box],
            }
            for label, score, box in triples
        ],
    }


def _draw(output: Path, files: Sequence[Path], place: int, trained: Trained, result: dict[str, Any], mode: str) -> None:
    """The image with its boxes, or with its most probable label below it; names of files are their paths'."""
    image = _read(files[place], mode, trained.detects).convert("RGB")
    root = os.path.commonpath([file.absolute().parent for file in files])
    name = quote(str(files[place].absolute().relative_to(root)), safe="")
    target = _pictures(output) / f"{name}.jpg"
    with writing(output, "--output"):
        target.parent.mkdir(parents=True, exist_ok=True)
        if trained.detects:
            from .detect.pictures import draw_detections

            draw_detections(image, result["detections"]).save(target, quality=90)
        else:
            _captioned(image, result["labels"]).save(target, quality=90)
    result["picture"] = str(target)


def _captioned(image: Any, labels: Sequence[dict[str, Any]]) -> Any:
    scale = max(1, -(-_SIDE // min(image.size)))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    size = max(14, image.height // 20)
    page = Image.new("RGB", (image.width, image.height + 2 * size), "white")
    page.paste(image)
    text = f"{labels[0]['label']} {labels[0]['probability']:.2f}"
    font: Any = ImageFont.load_default(size)
    ImageDraw.Draw(page).text((size // 2, image.height + size // 3), text, fill="black", font=font)
    return page
