"""A teacher's outputs on disk, by image and augmentation, so that it runs once for each of them, or never.

An augmentation, its mixup and its erasing are a function of (seed, sample, view); see `dtokd.train.keyed`. So a row of
the cache is found again by (sample, view), as in TinyViT (Wu et al., *TinyViT: Fast Pretraining Distillation for Small
Vision Transformers*, ECCV 2022, Sec. 3.1), which stores the seed of each augmentation and a few of the logits.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.filesize import decimal
from torch import Tensor, nn

from .. import identity
from ..errors import UsageError
from ..files import write_text, writing
from .rows import Layout
from .taps import Outputs, Taps
from .teacher import Teacher

OPTION = "--kd-cache-teacher"
#: Why objectives on other outputs are refused.
TOO_LARGE = (
    f"{OPTION}: it keeps logits, pooled features and a detector's predictions; feature maps and tokens take too much "
    "room; choose another --kd-distill-type, or leave the cache out"
)
#: Rows of a file that are looked at together.
_ROWS = 4096
#: Of `Outputs`, what may be stored: the others are dense maps, or a detector's tokens.
_STORED = ("logits", "pooled", "boxes", "quality")


@dataclass(frozen=True)
class Keyed:
    """Targets of a batch whose images can be made again.

    Attributes:
        target: what the task loss takes.
        keys: [B, 2] int64, sample and view of each image, on the CPU.
    """

    target: Any
    keys: Tensor

    def to(self, *args: Any, **options: Any) -> Keyed:
        """With the target elsewhere; the keys are read on the host."""
        return Keyed(self.target.to(*args, **options), self.keys)

    def pin_memory(self) -> Keyed:
        """For `torch.utils.data.DataLoader`."""
        return self if isinstance(self.target, list) else Keyed(self.target.pin_memory(), self.keys)


@dataclass(frozen=True)
class CachedImages:
    """The images that a run will show to its teacher.

    Attributes:
        count: samples of the data set.
        used: by view, which samples [n] int64 of it a run sees.
        seed: of everything random about them.
        told: what else they depend on, plain values by the names that messages use.
    """

    count: int
    used: Mapping[int, Tensor]
    seed: int
    told: Mapping[str, Any]


class Whole:
    """Everything is stored, in one dtype: in float32 nothing is lost."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def encode(self, outputs: Outputs) -> dict[str, Tensor]:
        """Columns [B, ...] of a row."""
        values = {name: getattr(outputs, name) for name in _STORED}
        return {name: value.to(self.dtype) for name, value in values.items() if value is not None}

    def trim(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """The columns of a batch, still on the CPU, without what only fills rows up."""
        return columns

    def decode(self, columns: dict[str, Tensor]) -> tuple[Outputs, Tensor | None]:
        """Outputs in float32, and [B, n] which places or queries they are of; None for all of them."""
        values: dict[str, Any] = {name: value.float() for name, value in columns.items()}
        return Outputs(**values), None


class TopClasses(Whole):
    """Of the logits the `k` greatest, and how much all the others have together.

    The rest of the probability is spread evenly over the other classes, as in TinyViT. At the given temperature it is
    exactly what the teacher gave them: with z the logits of the other C - k classes each of them becomes
    T (logsumexp(z / T) - log(C - k)). TinyViT has T = 1.

    Args:
        dtype: of the logits; the rest is float32.
        k: classes, fewer than the teacher has.
        classes: of the teacher.
        temperature: T > 0, of the objectives.
    """

    def __init__(self, dtype: torch.dtype, k: int, classes: int, temperature: float) -> None:
        super().__init__(dtype)
        self.k, self.classes, self.temperature = k, classes, temperature

    def encode(self, outputs: Outputs) -> dict[str, Tensor]:
        """The greatest logits, their classes, and the logit of each other class."""
        assert outputs.logits is not None
        values, index = outputs.logits.topk(self.k)
        others = outputs.logits.scatter(-1, index, -torch.inf) / self.temperature
        rest = self.temperature * (others.logsumexp(-1) - math.log(self.classes - self.k))
        small = torch.int16 if self.classes <= torch.iinfo(torch.int16).max else torch.int32
        columns = super().encode(outputs._replace(logits=values))
        return {**columns, "index": index.to(small), "rest": rest.float()}

    def decode(self, columns: dict[str, Tensor]) -> tuple[Outputs, Tensor | None]:
        """Logits of all classes."""
        index, rest = columns.pop("index"), columns.pop("rest")
        logits = rest[:, None].expand(-1, self.classes).scatter(-1, index.long(), columns["logits"].float())
        return super().decode({**columns, "logits": logits})


class TopPlaces(Whole):
    """Of a detector's places or queries the `k` where it is surest of an object; the others are left out of the loss.

    Args:
        dtype: of all numbers.
        k: places or queries.
        sureness: from the teacher's outputs to [B, N], by which they are chosen.
    """

    def __init__(self, dtype: torch.dtype, k: int, sureness: Callable[[Outputs], Tensor]) -> None:
        super().__init__(dtype)
        self.k, self.sureness = k, sureness

    def encode(self, outputs: Outputs) -> dict[str, Tensor]:
        """The chosen ones in their order, and their numbers; where the image has fewer, -1 fills up."""
        sureness = self.sureness(outputs)
        short = self.k - min(self.k, sureness.shape[1])
        index = sureness.topk(self.k - short).indices.sort().values
        columns = super().encode(outputs.of_queries(index))
        filled = {n: F.pad(c, [0, 0] * (c.ndim - 2) + [0, short]) for n, c in columns.items()}
        return {**filled, "places": F.pad(index.int(), [0, short], value=-1)}

    def trim(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """As many places as all images of the batch have."""
        there = int((columns["places"] >= 0).sum(1).min())
        return {name: column[:, :there].contiguous() for name, column in columns.items()}

    def decode(self, columns: dict[str, Tensor]) -> tuple[Outputs, Tensor | None]:
        """The chosen ones."""
        places = columns.pop("places").long()
        return super().decode(columns)[0], places


class TeacherCache:
    """Outputs of one teacher for all images of a data set, a file of rows for each view.

    `cache.json` holds what the outputs depend on. A row counts where its checksum does, so that one that was never
    written, half written or damaged is a missing one, which the teacher computes again. Several processes may use a
    cache at once.

    Args:
        folder: of this teacher's cache; it need not be there.
        images: that it is of.
        told: what its outputs depend on besides the images, plain values by the names that messages use.

    Raises:
        UsageError: the folder holds a cache of something else, or no cache.
    """

    def __init__(self, folder: Path, images: CachedImages, told: Mapping[str, Any]) -> None:
        self.folder, self._images = folder, images
        self._told = _plain({**told, **images.told, "--seed": images.seed, **_versions()})
        self._kept = Whole(torch.float32)
        self.facts: dict[str, Any] = {}
        self.taps: Taps | None = None
        self._layout: Layout | None = None
        self._files: dict[int, tuple[int, Tensor]] = {}
        self._read()
        self._missing: int | None = None

    def _read(self) -> None:
        path = self.folder / "cache.json"
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            told, self.facts, self.taps = found["told"], found["facts"], _taps(found["taps"])
            self._layout = Layout(found["columns"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(f"{OPTION}: {path} cannot be read ({error}); remove {self.folder}") from error
        names = [*told, *(name for name in self._told if name not in told)]
        other = [n for n in names if told.get(n) != self._told.get(n)]
        if other:
            changes = "; ".join(f"{n} was {told.get(n)}, is now {self._told.get(n)}" for n in other[:3])
            more = f"; {len(other) - 3} more differ" if len(other) > 3 else ""
            raise UsageError(
                f"{OPTION}: {self.folder} was made with other settings: {changes}{more}; pass those, or another folder"
            )

    def keep(self, kept: Whole, taps: Taps, facts: Mapping[str, Any]) -> None:
        """Choose how rows are made.

        Args:
            kept: the kind of row.
            taps: what this run reads of the teacher.
            facts: about the teacher, plain values, for runs that do not load it.

        Raises:
            UsageError: dense maps are read, or something that the cache does not have.
        """
        if taps != Taps(logits=taps.logits, pooled=taps.pooled):
            raise UsageError(TOO_LARGE)
        self._kept = kept
        if self.taps is None:
            self.taps, self.facts = taps, dict(facts)
        elif (taps.logits and not self.taps.logits) or (taps.pooled and taps.pooled != self.taps.pooled):
            raise UsageError(
                f"{OPTION}: {self.folder} has {_name(self.taps)}, this run reads {_name(taps)}; pass another folder"
            )

    def lay_out(self, outputs: Outputs) -> None:
        """Know the size of a row, from the teacher's outputs of some images."""
        if self._layout is None:
            self._layout = Layout.of(self._kept.encode(outputs))

    @property
    def complete(self) -> bool:
        """Whether the teacher need not run; the answer is that of the first question."""
        return self.missing == 0

    @property
    def missing(self) -> int:
        """Rows of the run that were not there when this was asked first."""
        if self._missing is None:
            self._missing = sum(self._count_missing(view, used) for view, used in self._images.used.items())
        return self._missing

    def _count_missing(self, view: int, used: Tensor) -> int:
        if self._layout is None or not self._open(view):
            return len(used)
        there = sum(int(self._find(part, view)[1].sum()) for part in used.sort().values.split(_ROWS))
        return len(used) - there

    def reserve(self, say: Callable[[str], None]) -> None:
        """State the size, and take that much of the disk, before training.

        Args:
            say: tells the user.

        Raises:
            UsageError: the disk has not as much, or may not be written.
        """
        assert self._layout is not None
        assert self.taps is not None
        views, size = len(self._images.used), self._layout.size
        total = views * self._images.count * size
        rows = sum(map(len, self._images.used.values()))
        there = f"{rows - self.missing} of {rows} rows are there"
        say(
            f"teacher cache {self.folder}: {self._images.count} images, {views} augmentations, {size} bytes a row: "
            f"{decimal(total)}; {there}" + ("; the teacher is not needed" if self.complete else "")
        )
        if self.complete:
            return
        with writing(self.folder, OPTION):
            self.folder.mkdir(parents=True, exist_ok=True)
            wanted = sum(max(0, self._images.count * size - self._taken(view)) for view in self._images.used)
            free = shutil.disk_usage(self.folder).free
            if wanted > free:
                raise UsageError(
                    f"{OPTION}: {self.folder} needs {decimal(wanted)} more, the disk has {decimal(free)}; pass fewer "
                    "--kd-cache-views, a smaller --kd-cache-topk, --kd-cache-dtype float16, or another folder"
                )
            if not (self.folder / "cache.json").exists():
                taps = {"logits": self.taps.logits, "pooled": self.taps.pooled}
                held = {"told": self._told, "taps": taps, "facts": self.facts, "columns": self._layout.columns}
                write_text(self.folder / "cache.json", json.dumps(_plain(held), indent=1))
            for view in self._images.used:
                self._make(view)

    def _path(self, view: int) -> Path:
        return self.folder / (f"mixed-{view:04}.rows" if view >= 0 else f"unmixed-{-1 - view:04}.rows")

    def _taken(self, view: int) -> int:
        path = self._path(view)
        return path.stat().st_blocks * 512 if path.exists() else 0

    def _make(self, view: int) -> None:
        """Have the file in its whole length, with its room on the disk."""
        assert self._layout is not None
        length = self._images.count * self._layout.size
        if view in self._files:
            os.close(self._files.pop(view)[0])
        descriptor = os.open(self._path(view), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, length)
            elif os.fstat(descriptor).st_size < length:
                os.ftruncate(descriptor, length)
        except OSError as error:
            error.filename = str(self._path(view))
            raise
        finally:
            os.close(descriptor)
        self._open(view)

    def _open(self, view: int) -> bool:
        """Whether there is a file of the view."""
        assert self._layout is not None
        if view in self._files:
            return True
        path, shape = self._path(view), (self._images.count, self._layout.size)
        if not path.exists() or path.stat().st_size < shape[0] * shape[1]:
            return False
        writable = os.access(path, os.W_OK)
        # "c" is never written to; torch warns of an array that cannot be
        rows = torch.from_numpy(np.memmap(path, np.uint8, "r+" if writable else "c", shape=shape))
        self._files[view] = os.open(path, os.O_RDWR if writable else os.O_RDONLY), rows
        return True

    def _find(self, samples: Tensor, view: int) -> tuple[Tensor, Tensor]:
        """Rows [B, size] of samples, and which of them are whole."""
        assert self._layout is not None
        rows = self._files[view][1][samples]
        return rows, self._layout.whole(rows, torch.stack([samples, torch.full_like(samples, view)], 1))

    def __call__(
        self, teacher: Teacher, images: Any, keys: Tensor, device: torch.device
    ) -> tuple[Outputs, Tensor | None]:
        """The outputs of a batch; where one is missing the teacher runs for all of it, so that rounding is the same.

        Args:
            teacher: whose outputs.
            images: as the teacher takes them.
            keys: [B, 2] int64 (sample, view), on the CPU; of one view.
            device: of the outputs.

        Returns:
            Outputs, float32, and [B, n] int64 which places or queries they are of; None for all of them.

        Raises:
            UsageError: an output is missing and the teacher was not loaded; or it cannot be stored.
        """
        assert self._layout is not None
        assert self.taps is not None
        samples, view = keys[:, 0], int(keys[0, 1])
        if not self._open(view):
            with writing(self.folder, OPTION):
                self._make(view)
        rows, there = self._find(samples, view)
        if not there.all():
            if is_absent(teacher.model):
                raise UsageError(
                    f"{OPTION}: {self._path(view)} has lost rows since this run began, and the teacher was not loaded; "
                    "--resume auto goes on with the teacher"
                )
            rows = self._add(self._kept.encode(teacher(images, self.taps)), rows, there, keys)
        columns = self._kept.trim(self._layout.unpack(rows))
        if device.type == "cuda":  # from pageable memory the host would wait for all that the device has to do
            columns = {name: column.pin_memory() for name, column in columns.items()}
        return self._kept.decode({name: column.to(device, non_blocking=True) for name, column in columns.items()})

    def _add(self, columns: dict[str, Tensor], rows: Tensor, there: Tensor, keys: Tensor) -> Tensor:
        assert self._layout is not None
        for name, column in columns.items():
            if column.dtype == torch.float16 and column.isinf().any():
                raise UsageError(
                    f"--kd-cache-dtype float16: the teacher's {name} are beyond its range; pass bfloat16 or float32"
                )
        rows = torch.where(there[:, None], rows, self._layout.pack(columns, keys))
        view = int(keys[0, 1])
        with writing(self.folder, OPTION):
            for number in (~there).nonzero()[:, 0].tolist():
                data = rows[number].numpy().data
                os.pwrite(self._files[view][0], data, int(keys[number, 0]) * self._layout.size)
        return rows

    def flush(self) -> None:
        """Have all that was written on disk, also if the machine loses power."""
        for view, (descriptor, _) in self._files.items():
            if os.access(self._path(view), os.W_OK):
                os.fsync(descriptor)


class Absent(nn.Module):
    """In a teacher's place where all its outputs are stored, with what was noted of it.

    Args:
        facts: attributes.
    """

    absent = True

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in facts.items():
            setattr(self, name, value)


def is_absent(model: nn.Module) -> bool:
    """Whether a teacher was not loaded, as its outputs are stored."""
    return bool(getattr(model, "absent", False))


def kept_generators(device: torch.device) -> AbstractContextManager[None]:
    """Around the loading of a teacher: torch's random numbers afterwards are those of a run that does not load it."""
    manager: AbstractContextManager[None] = torch.random.fork_rng([device] if device.type == "cuda" else [])
    return manager


def _taps(held: dict[str, Any]) -> Taps:
    return Taps(logits=bool(held["logits"]), pooled=str(held["pooled"]))


def _name(taps: Taps) -> str:
    parts = [*(["logits"] if taps.logits else []), *([f"pooled features ({taps.pooled})"] if taps.pooled else [])]
    return " and ".join(parts) or "predictions"


def _versions() -> dict[str, str]:
    """Of what makes images and outputs; this package's may change without changing either."""
    import PIL

    held = {**identity.versions(), "Pillow": PIL.__version__, "format": "1"}
    del held["dtokd_kernels"]
    return {f"{name} version": version for name, version in held.items()}


def _plain(value: Any) -> Any:
    """As JSON holds it."""
    return json.loads(json.dumps(value, default=str))
