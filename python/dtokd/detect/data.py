"""COCO-format splits: torchvision's data set and transforms v2, batches padded to one size."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, VisionDataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .. import identity
from ..errors import UsageError
from ..objectives.cache import CachedImages, Keyed
from ..train.batches import Batches
from ..train.images import CheckedImages, convert
from ..train.keyed import Key, KeyedDataset, KeyedOrder, cached_images, seed_of
from ..train.workers import worker_seed
from ..train.world import World
from .annotations import Annotations, read_annotations
from .batch import Images, Target, padded
from .boxes import NEARLY_ALL, count_small, usable

#: What an augmented image depends on.
_AUGMENTATION = (
    *("train_split", "on_bad_image", "img_size", "max_size", "square", "scales", "crop", "hflip", "color_jitter"),
)
#: EXIF's tag, and its values that exchange width and height.
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)


class CocoImages(CocoDetection):
    """torchvision's CocoDetection, with targets as detectors take them.

    Items are an image [3, H, W] float32 in [0, 1] and a `batch.Target`, with the file's "image_id"; an image without
    boxes has empty ones.

    Args:
        root: folder of the images.
        annotations: of `read_annotations`.
        transforms: of torchvision's v2, on image and target.
    """

    def __init__(self, root: Path, annotations: Annotations, transforms: Any) -> None:
        VisionDataset.__init__(self, root, transforms)  # CocoDetection would read the file once more
        self.coco = index(annotations.content)
        self.ids = sorted(self.coco.imgs)
        self._image_ids = annotations.image_ids

    def identity(self) -> str:
        """sha256 of the annotations and the images, see `identity.of_dataset`."""
        names = [str(entry["file_name"]) for entry in self.coco.dataset["images"]]
        told = json.dumps([self.coco.dataset["annotations"], self.coco.dataset["categories"]], sort_keys=True)
        images = identity.of_files((Path(self.root) / name, name) for name in names)
        return hashlib.sha256(f"{images} {told}".encode()).hexdigest()

    def filename(self, index: int) -> str:
        """For messages."""
        return str(self.coco.imgs[self.ids[index]]["file_name"])

    def _load_image(self, id: int) -> Any:
        """Upright, unless the size that the file notes is the one before its rotation.

        Programs to annotate with show photographs as their EXIF says, and so are boxes and sizes in nearly all files;
        COCO's own tools, which read pixels as they are stored, fill in the size in the others.
        """
        told = self.coco.imgs[id]
        size = told["width"], told["height"]
        with Image.open(Path(self.root) / told["file_name"]) as stored:
            stored.load()  # turns TIFF's upright itself
            orientation = stored.getexif().get(ORIENTATION, 1)
            upright = stored.size[::-1] if orientation in SIDEWAYS else stored.size
            if size not in (stored.size, upright):  # boxes would be scaled wrongly
                raise ValueError(f"it has {upright} pixels, the annotations have {size[0]} x {size[1]}")
            turned = ImageOps.exif_transpose(stored) if orientation != 1 and size == upright else stored
            return convert(turned, "RGB")

    def _load_target(self, id: int) -> Any:
        image = self.coco.imgs[id]
        size = (image["height"], image["width"])
        kept = [a for a in super()._load_target(id) if usable(a, image)]
        boxes = torch.tensor([a["bbox"] for a in kept], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([a["category_id"] for a in kept], dtype=torch.int64),
            "image_id": self._image_ids[id],
            "original": size,
        }


def index(content: dict[str, Any]) -> Any:
    """Pycocotools' COCO of a file's content; it prints, which nobody needs."""
    from pycocotools.coco import COCO

    with redirect_stdout(StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
    return coco


class RandomSizeCrop(v2.Transform):
    """Crop to a random height and width between two sizes, or the image's own where that is smaller (DETR)."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Where and how large."""
        height, width = v2.query_size(flat_inputs)

        def between(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, ()))

        h = between(min(self.low, height), min(self.high, height))
        w = between(min(self.low, width), min(self.high, width))
        return {"top": between(0, height - h), "left": between(0, width - w), "height": h, "width": w}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Of an image or its boxes."""
        return F.crop(inpt, **params)


def make_transforms(options: argparse.Namespace, training: bool) -> v2.Transform:
    """Resize, and in training scales, crops, flips and colours."""
    size, most = options.img_size, options.max_size
    if options.square:
        resize: list[v2.Transform] = [v2.Resize((size, size), antialias=True)]
    else:
        scales = options.scales if training and options.scales else [size]
        resize = [v2.RandomShortestSize(scales, most, antialias=True)]
    if not training:
        return v2.Compose([v2.ToImage(), *resize, v2.ToDtype(torch.float32, scale=True)])
    steps: list[v2.Transform] = [v2.ToImage()]
    if options.color_jitter:
        steps.append(v2.ColorJitter(*[options.color_jitter] * 3))
    if options.hflip:
        steps.append(v2.RandomHorizontalFlip(options.hflip))
    if options.crop:
        # as DETR and ViDT: half of the images are cropped after a resize of their own
        middle = v2.RandomShortestSize([size // 2, size * 5 // 8, size * 3 // 4], antialias=True)
        crop = v2.Compose([middle, RandomSizeCrop(size * 12 // 25, size * 3 // 4)])
        steps.append(v2.RandomApply([crop], p=0.5))
    steps += [*resize, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])


def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[Images, list[Target]]:
    """Pad at the right and below to the largest image, and to a multiple of 32."""
    images, targets = zip(*batch, strict=True)
    sizes = [(int(i.shape[-2]), int(i.shape[-1])) for i in images]
    height, width = (padded(max(s[d] for s in sizes)) for d in (0, 1))
    pixels = torch.zeros(len(images), 3, height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.bool)
    for i, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
        pixels[i, :, :h, :w] = image
        mask[i, :h, :w] = True
    plain = [{**t, "boxes": t["boxes"].as_subclass(Tensor), "size": s} for t, s in zip(targets, sizes, strict=True)]
    return Images(pixels, mask, sizes), plain


def collate_keyed(batch: Sequence[tuple[Tensor, Target, Key]]) -> tuple[Images, Keyed]:
    """As `collate`, of a `KeyedDataset`."""
    images, targets = collate([(image, target) for image, target, _ in batch])
    return images, Keyed(targets, torch.tensor([key for *_, key in batch]))


class OnDevice:
    """A loader whose batches are on the device; as timm's, it takes each while the one before is used.

    Attributes:
        loader: of batches of `collate` or `collate_keyed`.
        device: where to.
    """

    def __init__(self, loader: DataLoader[Any] | Batches, device: torch.device) -> None:
        self.loader, self.device = loader, device

    @property
    def sampler(self) -> Any:
        """Of the loader; it may be told the epoch."""
        return self.loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Images, Any]]:
        taken: tuple[Images, Any] | None = None
        batches: Iterable[Any] = self.loader
        for images, targets in batches:
            plain = targets.target if isinstance(targets, Keyed) else targets
            moved: Any = [{k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in t.items()} for t in plain]
            if isinstance(targets, Keyed):
                moved = Keyed(moved, targets.keys)
            if taken is not None:
                yield taken
            taken = images.to(self.device), moved
        if taken is not None:
            yield taken


def read_splits(options: argparse.Namespace) -> tuple[Annotations, Annotations | None]:
    """Annotations of the training and the validation split.

    Raises:
        UsageError: as `read_split`, or the splits have different categories, or nearly all boxes become too small.
    """
    train = read_split(options, options.train_split)
    validation = read_split(options, options.val_split) if options.val_split else None
    if validation is not None and validation.categories != train.categories:
        only = sorted(set(train.categories.items()) ^ set(validation.categories.items()), key=str)[0]
        raise UsageError(
            f"--annotations: the categories of {train.path} and {validation.path} differ, first in {only}; labels "
            "would not mean the same"
        )
    small, objects = small_boxes(train, options), train.boxes.objects
    if small >= NEARLY_ALL * objects:
        raise UsageError(
            f"--img-size: {small} of {objects} boxes of {train.path} are less than a pixel wide or high in images of "
            f"{options.img_size} pixels, so there is next to nothing to learn from; pass a larger one, or cut the "
            "images into parts"
        )
    return train, validation


def small_boxes(annotations: Annotations, options: argparse.Namespace) -> int:
    """How many of the boxes training drops since the largest size of its images leaves them no whole pixel."""

    def resized(height: int, width: int) -> tuple[int, int]:
        if options.square:
            return options.img_size, options.img_size
        # as RandomShortestSize
        ratio = min(
            max(options.scales or [options.img_size]) / min(height, width), options.max_size / max(height, width)
        )
        return int(height * ratio), int(width * ratio)

    return count_small(annotations.content["annotations"], annotations.content["images"], resized)


def read_split(options: argparse.Namespace, split: str) -> Annotations:
    """Annotations of one split.

    Raises:
        UsageError: no such folder, or as `read_annotations`.
    """
    if options.data_dir is None:
        raise UsageError("--data-dir: missing; pass the folder that holds images and annotations")
    if not options.data_dir.is_dir():
        raise UsageError(f"--data-dir: {options.data_dir} is no folder; pass the one with images and annotations")
    if not (options.data_dir / split).is_dir():
        raise UsageError(
            f"--data-dir: {options.data_dir} has no folder {split!r} for this split; make one, or name another with "
            "--train-split or --val-split"
        )
    path = options.data_dir / options.annotations.replace("{split}", split)
    return read_annotations(path, options.data_dir / split)


def make_loader(
    options: argparse.Namespace,
    annotations: Annotations,
    split: str,
    *,
    training: bool,
    device: torch.device,
    record: Path | None = None,
    world: World | None = None,
) -> OnDevice:
    """A split's batches; random numbers are torch's own, so that a checkpoint of them resumes the order.

    Of several processes each has a part: in training of an order that is drawn from seed and epoch, filled up so that
    all have as many; in evaluation every image is in one part.

    Args:
        options: of `detect.options`.
        annotations: of the split.
        split: its name.
        training: augmented and shuffled, whole batches only.
        device: of the batches.
        record: where images that are skipped are noted.
        world: the processes that train together; default: this one alone.

    Raises:
        UsageError: fewer images than one training batch takes.
    """
    size, world = options.batch_size, world or World()
    count = len(annotations.content["images"])
    checked: Any = CocoImages(options.data_dir / split, annotations, make_transforms(options, training))
    checked = CheckedImages(checked, split, options.on_bad_image == "skip", record)
    order: KeyedOrder | None = None
    sampler: Any = None
    if training and options.kd_cache_teacher:
        checked = KeyedDataset(checked, seed_of(options))
        # without --square the images of a batch share a padding, which the teacher sees
        group = 1 if options.square else size
        order = KeyedOrder(count, size, checked.seed, options.kd_cache_views, group, rank=world.rank, size=world.size)
    elif world.joined and training:
        seed = options.seed if options.data_seed is None else options.data_seed
        sampler = DistributedSampler(checked, world.size, world.rank, seed=seed)
    elif world.joined:
        sampler = range(world.rank, count, world.size)
    if training and (count // world.size if order else -(-count // world.size)) < size:
        part = ", of which each rank has a part" if world.joined else ""
        raise UsageError(f"--batch-size: {size}, but {split!r} holds {count} images{part}; pass a smaller one")
    loader = DataLoader(
        checked,
        batch_size=size if training else options.validation_batch_size or size,
        shuffle=training and sampler is None,
        sampler=sampler,
        drop_last=training,
        num_workers=options.workers,
        collate_fn=collate if order is None else collate_keyed,
        pin_memory=options.pin_mem,
        worker_init_fn=_start_worker if options.workers else None,
    )
    return OnDevice(Batches(loader, order) if training else loader, device)


def cached(options: argparse.Namespace, loader: Batches) -> CachedImages | None:
    """What the run will show its teacher, where that has a cache.

    Args:
        options: of `detect.options`.
        loader: of the training split.
    """
    if not options.kd_cache_teacher:
        return None
    images: Any = loader.dataset
    names = [*_AUGMENTATION, *(() if options.square else ("batch_size",))]
    told = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    return cached_images(
        options, loader.batch_sampler, {**told, "training data (sha256)": identity.of_dataset(images.dataset)}
    )


def first_images(loader: OnDevice) -> OnDevice:
    """All images of a split in their order, whatever part of them the loader has."""
    images: Any = loader.loader.dataset
    return OnDevice(DataLoader(images, collate_fn=collate), loader.device)


def _start_worker(number: int) -> None:
    """Torch has seeded it; Ctrl-C is the main process's."""
    worker_seed(torch.utils.data.get_worker_info())
