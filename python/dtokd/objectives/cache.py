"""The teacher's outputs on disk: its forward pass is the largest single share of an iteration."""

from __future__ import annotations

import hashlib
import json
import random
import uuid
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from .. import identity
from ..files import digest_of, write_tensors, write_text
from .taps import Outputs, Taps
from .teacher import Teacher

SHARD = 1024


class KeyedDataset(Dataset[tuple[Any, Any, Tensor]]):
    """Wraps an image dataset so that an image depends on nothing but (sample, view), and says which it is.

    Item i is (image, target, key) with key = int64 [i, view]. While the wrapped item is made, the global random
    generators of Python, numpy and torch are seeded from (seed, i, view) and put back after, whatever worker runs it.

    Args:
        dataset: map-style, of (image, target), with its transform.
        seed: of the augmentation.
        views: augmentations per sample: epoch e uses view e modulo `views`; 0: view e.
        description: what else the images depend on; part of the cache's key, as are the names and contents of the
            samples (`identity.of_dataset`), their number and the repr of the transform. It must tell data sets apart
            whose samples are neither files nor in memory.
    """

    def __init__(self, dataset: Any, seed: int = 0, views: int = 1, description: str = "") -> None:
        if views < 0:
            raise ValueError(f"KeyedDataset: views is {views}; pass 0 (another in each epoch) or more")
        self.dataset, self.seed, self.views, self.epoch = dataset, seed, views, 0
        self._description = description

    @property
    def transform(self) -> Any:
        """Of the data set, as timm's loaders set it."""
        return getattr(self.dataset, "transform", None)

    @transform.setter
    def transform(self, value: Any) -> None:
        self.dataset.transform = value

    @property
    def fingerprint(self) -> str:
        """What the images depend on."""
        samples = identity.of_dataset(self.dataset)
        return f"{self._description} {len(self.dataset)} {samples} {self.seed} {self.transform!r}"

    def set_epoch(self, epoch: int) -> None:
        """Before each epoch, and before its workers start (no persistent workers, unless views is 1)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, Tensor]:
        view = self.epoch % self.views if self.views else self.epoch
        with _seeded(self.seed, index, view):
            image, target = self.dataset[index]
        return image, target, torch.tensor([index, view])


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    seed = int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "big")
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class TeacherCache:
    """Outputs of one teacher, by (sample, view), in safetensors shards under a directory named by their key.

    The key covers the teacher's layers, weights and dtype, how it sees the images, what is read of it, the dataset's
    fingerprint, and the versions of torch, timm and this package: any change makes another directory, and old ones can
    be deleted. Shards are written whole (temporary
    file, fsync, rename) and with a checksum: a damaged one is removed with a warning, and its samples are computed
    anew. A process that dies loses what it had not yet flushed, at most `shard` samples.

    Args:
        directory: of all caches.
        teacher: whose outputs.
        taps: what is read.
        dataset: its `fingerprint` enters the key.
        shard: samples per file.
        context: what else the outputs depend on, such as the autocast around the teacher.
    """

    def __init__(
        self,
        directory: Path,
        teacher: Teacher,
        taps: Taps,
        dataset: KeyedDataset,
        shard: int = SHARD,
        context: str = "",
    ) -> None:
        described = {
            "teacher": teacher.fingerprint(),
            "name": teacher.name,
            "taps": repr(taps),
            "data": dataset.fingerprint,
            "context": context,
            "versions": identity.versions(),
        }
        text = json.dumps(described, indent=1, sort_keys=True)
        self.directory = Path(directory) / hashlib.sha256(text.encode()).hexdigest()[:16]
        write_text(self.directory / "key.json", text)
        self.shard, self.taps = shard, taps
        self.hits = self.misses = 0
        self._rows: dict[tuple[int, int], tuple[dict[str, Tensor], int]] = {}
        self._pending: list[tuple[tuple[int, int], dict[str, Tensor]]] = []
        self._files: set[Path] = set()
        self.refresh()
        weakref.finalize(self, _flush, self.directory, self._pending)  # at exit too

    def _index(self, tensors: dict[str, Tensor]) -> None:
        for row, (sample, view) in enumerate(tensors["key"].tolist()):
            self._rows[sample, view] = (tensors, row)

    def __call__(self, teacher: Teacher, images: Tensor, taps: Taps, key: Tensor) -> Outputs:
        """The outputs of a batch; the teacher runs for the samples that are not there yet.

        Args:
            teacher: see the class.
            images: [B, ...] normalised for the student.
            taps: as given to the constructor.
            key: [B, 2] (sample, view).
        """
        if taps != self.taps:
            raise ValueError(f"teacher cache: made for {self.taps}, asked for {taps}")
        keys = [(int(sample), int(view)) for sample, view in key.tolist()]
        new = [i for i, k in enumerate(keys) if k not in self._rows]
        self.hits, self.misses = self.hits + len(keys) - len(new), self.misses + len(new)
        if new:
            self._add([keys[i] for i in new], teacher(images if len(new) == len(keys) else images[new], taps))
        rows = [self._rows[k] for k in keys]
        columns = {n: torch.stack([t[n][row] for t, row in rows]).to(images.device) for n in rows[0][0] if n != "key"}
        maps = tuple(columns[f"map{i}"] for i in range(len(taps.stages)))
        return Outputs(columns.get("logits"), columns.get("token_logits"), columns.get("pooled"), maps)

    def _add(self, keys: Sequence[tuple[int, int]], outputs: Outputs) -> None:
        columns = {n: getattr(outputs, n) for n in ("logits", "token_logits", "pooled")}
        columns |= {f"map{i}": m for i, m in enumerate(outputs.maps)}
        kept = {n: c.cpu() for n, c in columns.items() if c is not None}
        kept["key"] = torch.tensor(keys)
        self._index(kept)
        self._pending += [(k, {n: c[i] for n, c in kept.items()}) for i, k in enumerate(keys)]
        if len(self._pending) >= self.shard:
            self.flush()

    def flush(self) -> None:
        """Write what is new, which is read from the file from then on. After it there is nothing to lose."""
        path = _flush(self.directory, self._pending)
        if path is not None:
            self._read(path)

    def refresh(self) -> None:
        """Know what other processes have written since."""
        for path in sorted(set(self.directory.glob("*.safetensors")) - self._files):
            self._read(path)

    def _read(self, path: Path) -> None:
        self._files.add(path)
        try:
            with safe_open(path, framework="pt") as file:  # mapped: what is not asked for leaves memory again
                checksum = (file.metadata() or {}).get("sha256")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            whole = checksum == digest_of(tensors)
        except (SafetensorError, OSError):
            whole = False
        if whole:
            self._index(tensors)
            return
        warnings.warn(
            f"teacher cache: {path} is damaged, so it is removed and its samples are computed anew", stacklevel=2
        )
        with suppress(OSError):  # a cache that may only be read
            path.unlink()


def _flush(directory: Path, pending: list[tuple[tuple[int, int], dict[str, Tensor]]]) -> Path | None:
    if not pending:
        return None
    names = pending[0][1]
    columns = {n: torch.stack([row[n] for _, row in pending]) for n in names}
    path = directory / f"{uuid.uuid4().hex}.safetensors"
    write_tensors(path, columns, {"sha256": digest_of(columns)})
    pending.clear()
    return path
