"""Images that cannot be read: an error that names the file, or a neighbour in its place and a note."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..errors import UsageError

#: timm's limit of consecutive ones
_TRIES = 10


class CheckedImages(Dataset[Any]):
    """A data set of timm or torchvision with `--on-bad-image`.

    Args:
        images: the data set; its transform is set through this one.
        split: what messages call it.
        skip: the next image stands in for one that cannot be read; else that is an error.
        record: names of those skipped are appended to this file, also by worker processes.
        mode: Pillow's, that images are converted to; None leaves them to the transform.

    Attributes:
        images: see above.
        positions: of its samples that are used, in their order: all of them, but for a `part`.
    """

    positions: Sequence[int]

    def __init__(self, images: Any, split: str, skip: bool, record: Path | None, mode: str | None = None) -> None:
        self.images, self.split, self.skip, self.record = images, split, skip, record
        self.positions = range(len(images))
        if hasattr(images, "_max_retries"):
            images._max_retries = 1  # timm's ImageDataset would go on to the next one itself, and only log it
        self._mode = mode
        if hasattr(images, "input_img_mode"):
            images.input_img_mode = None  # converted below instead
        if hasattr(images, "loader"):  # torchvision's folders, in RGB
            images.loader = _load
        self.transform = images.transform

    @property
    def transform(self) -> Any:
        """Of the data set, after the conversion to its mode."""
        return self._transform

    @transform.setter
    def transform(self, value: Any) -> None:
        self._transform = value
        self.images.transform = _Converted(self._mode, value) if self._mode else value

    def part(self, positions: Sequence[int]) -> CheckedImages:
        """Some of the samples, with a transform of their own; one of them stands in for one that cannot be read."""
        found = copy.copy(self)
        found.images, found.positions = copy.copy(self.images), positions  # the files are shared
        return found

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Any:
        for _ in range(_TRIES):
            place = self.positions[index]
            try:
                with _quiet():
                    return self.images[place]
            except Exception as error:
                name, reason = self._name(place), self._reason(place, error)
                if not self.skip:
                    raise UsageError(
                        f"--data-dir: image {name} of {self.split!r} cannot be read: {reason}; repair or remove it, or "
                        "pass --on-bad-image skip"
                    ) from error
                if self.record is not None:
                    with self.record.open("a", encoding="utf-8") as file:
                        file.write(f"{self.split}\t{name}\t{reason}\n")
            index = (index + 1) % len(self)
        raise UsageError(f"--data-dir: {_TRIES} images of {self.split!r} in a row cannot be read, the last is {name}")

    def _name(self, index: int) -> str:
        if hasattr(self.images, "filename"):
            return str(self.images.filename(index))
        samples = getattr(self.images, "samples", None)
        return str(samples[index][0]) if samples else f"number {index}"

    def _reason(self, index: int, error: Exception) -> str:
        """The reason in one line: timm's own error does not have it."""
        if hasattr(self.images, "reader"):
            from PIL import Image

            try:
                with Image.open(self.images.reader[index][0]) as image:
                    image.load()
            except Exception as found:
                error = found
        return f"{type(error).__name__}: {error}".splitlines()[0]


class _Converted:
    """A transform of images in one mode."""

    def __init__(self, mode: str, inner: Any) -> None:
        self.mode, self.inner = mode, inner

    def __call__(self, image: Any) -> Any:
        converted = convert(image, self.mode)
        return converted if self.inner is None else self.inner(converted)


def convert(image: Any, mode: str) -> Any:
    """As Pillow's `convert`, which would cut all values above 255 off instead of scaling them.

    Raises:
        ValueError: the image has more than 8 bits per value.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"it has more than 8 bits per value (Pillow's mode {image.mode!r}), whose scale is not known; convert it"
        )
    return image.convert(mode)


def _load(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return image


@contextmanager
def _quiet() -> Iterator[None]:
    """Without timm's warning, which would come beside ours."""
    logger = logging.getLogger("timm.data.dataset")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def new_record(run: Path) -> Path:
    """The file for what an evaluation of a run skips, without what an earlier one has skipped."""
    record = run / "bad_images_eval.txt"
    if record.exists():
        record.unlink()
    return record


def skipped(record: Path) -> list[str]:
    """The images that were skipped, each once: "split: name (reason)"."""
    if not record.exists():
        return []
    lines = dict.fromkeys(record.read_text(encoding="utf-8").splitlines())
    parts = [line.split("\t") for line in lines]
    return [f"{p[0]}: {p[1]} ({p[2]})" for p in parts if len(p) == 3]
