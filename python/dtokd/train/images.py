"""Images that cannot be read: an error that names the file, or a neighbour in its place and a note."""

from __future__ import annotations

import logging
from collections.abc import Iterator
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
    """

    def __init__(self, images: Any, split: str, skip: bool, record: Path | None) -> None:
        self.images, self.split, self.skip, self.record = images, split, skip, record
        if hasattr(images, "_max_retries"):
            images._max_retries = 1  # timm's ImageDataset would go on to the next one itself, and only log it

    @property
    def transform(self) -> Any:
        """Of the data set."""
        return self.images.transform

    @transform.setter
    def transform(self, value: Any) -> None:
        self.images.transform = value

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        for _ in range(_TRIES):
            try:
                with _quiet():
                    return self.images[index]
            except Exception as error:
                name, reason = self._name(index), self._reason(index, error)
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
        """Why, in one line: timm's own error does not say."""
        if hasattr(self.images, "reader"):
            from PIL import Image

            try:
                with Image.open(self.images.reader[index][0]) as image:
                    image.load()
            except Exception as found:
                error = found
        return f"{type(error).__name__}: {error}".splitlines()[0]


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


def skipped(record: Path) -> list[str]:
    """The images that were skipped, each once: "split: name (reason)"."""
    if not record.exists():
        return []
    lines = dict.fromkeys(record.read_text(encoding="utf-8").splitlines())
    parts = [line.split("\t") for line in lines]
    return [f"{p[0]}: {p[1]} ({p[2]})" for p in parts if len(p) == 3]
