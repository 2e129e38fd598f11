"""Data sets and loaders, by timm."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from timm.data import FastCollateMixup, create_dataset, create_loader
from timm.data.dataset_factory import _search_split
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.random_erasing import RandomErasing
from torch.utils.data import BatchSampler, IterableDataset

from .. import identity
from ..datafree.loader import SyntheticBatches
from ..errors import UsageError, reason_of
from ..objectives.cache import CachedImages
from .batches import Batches
from .found import class_names, some
from .images import CheckedImages
from .keyed import ErasedLoader, KeyedCollate, KeyedDataset, KeyedOrder, cached_images, seed_of
from .options import flag
from .workers import worker_seed

#: What the data sets of timm begin with that are no folder.
KINDS = ("torch", "hfds", "hfids", "tfds", "wds")
#: Arguments of timm's loader by which images are augmented and erased, and of its Mixup; each with the option for it.
_AUGMENTED = {
    **{name: name for name in ("no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter")},
    **{"auto_augment": "aa", "interpolation": "train_interpolation"},
}
_ERASED = {"re_prob": "reprob", "re_mode": "remode", "re_count": "recount"}
_MIXED = {
    **{"mixup_alpha": "mixup", "cutmix_alpha": "cutmix", "cutmix_minmax": "cutmix_minmax", "prob": "mixup_prob"},
    **{"switch_prob": "mixup_switch_prob", "mode": "mixup_mode"},
}


@dataclass
class Data:
    """What an epoch reads, and what it does with it.

    Attributes:
        train: of (input, target).
        validation: likewise, if there is a split for it.
        mixup: of the collation.
        cached: the images that teachers are shown, where their outputs are cached.
        batches: under `train`, to go on in the middle of an epoch; None for a stream.
        held_out: images that are never trained on, prepared as for validation, if there are any.
        judges: a `heldout.Judges` that computes on these.
        synthetic: `train` where its images are made from the teacher (--data-free).
    """

    train: Any
    validation: Any | None
    mixup: FastCollateMixup | None
    cached: CachedImages | None = None
    batches: Batches | SyntheticBatches | None = None
    held_out: Any | None = None
    judges: Any | None = None
    synthetic: SyntheticBatches | None = None


def identity_of(options: argparse.Namespace, images: Any) -> str | None:
    """What no other data set has: `identity.of_dataset`, or that of all that is in --data-dir; None without either.

    Args:
        options: of `add_data`.
        images: the data set, perhaps a `KeyedDataset`.
    """
    told = identity.of_dataset(images.dataset if isinstance(images, KeyedDataset) else images)
    return identity.of_folder(options.data_dir) if told is None and options.data_dir is not None else told


def open_dataset(options: argparse.Namespace, split: str, record: Path | None = None) -> Any:
    """One split, as timm finds it.

    Args:
        options: of `train.options.add_data`.
        split: its name.
        record: where skipped images are noted.

    Raises:
        UsageError: there is no such data.
    """
    root, name = options.data_dir, options.dataset
    kind, _, rest = name.partition("/")
    if name and not (kind.lower() in KINDS and rest):
        raise UsageError(
            f"--dataset: {name!r}; expected one of {', '.join(f'{kind}/NAME' for kind in KINDS)}, such as "
            "torch/cifar100, or nothing for a folder of images"
        )
    if kind.lower() == "torch" and root is None:
        raise UsageError(f"--data-dir: missing; pass the folder where {name} is, or is to go with --dataset-download")
    folder = not name or name.lower() in ("torch/image_folder", "torch/folder")
    if options.class_map and not options.class_map.lower().endswith(".txt"):
        raise UsageError(f"--class-map: {options.class_map}; expected a .txt file with the name of a class per line")
    if options.class_map and name.lower().startswith("torch/"):
        raise UsageError(
            f"--class-map: --dataset {name} is torchvision's, which orders its classes itself; leave it out"
        )
    if options.class_map:
        _check_class_map(options.class_map)
    if folder:
        if root is None:
            raise UsageError("--data-dir: missing; pass the folder that holds the images, or choose --dataset")
        if not root.exists():
            raise UsageError(f"--data-dir: {root} does not exist")
        if not root.is_dir() and options.val_split and split == options.train_split:
            raise UsageError(
                f"--data-dir: {root} is one file, so that the splits {options.train_split!r} and {options.val_split!r} "
                "would be the same images; pass --val-split '' for no evaluation, or a folder with a folder per split"
            )
        if root.is_dir() and os.path.samefile(_search_split(str(root), split), root):
            raise UsageError(
                f"--data-dir: {root} has no folder {split!r} for this split (timm would read all of {root} instead); "
                "make one, or name another with --train-split or --val-split"
            )
    try:
        images = create_dataset(
            name,
            root=None if root is None else str(root),
            split=split,
            is_training=split == options.train_split,
            download=options.dataset_download,
            batch_size=options.batch_size,
            # torchvision's data sets do not know these
            **({} if name.lower().startswith("torch/") else _reading(options)),
        )
    except Exception as error:  # of torchvision, datasets, tensorflow_datasets, webdataset
        given = [f"--dataset {name}"] if name else []
        given += [f"--class-map {options.class_map}"] if options.class_map else []
        reason = reason_of(error)
        raise UsageError(
            f"{', '.join([*given, f'--data-dir {root}'])}: split {split!r} cannot be opened: {reason}"
        ) from error
    if isinstance(images, IterableDataset):
        return images
    if len(images) == 0:
        raise UsageError(f"--data-dir: split {split!r} of {root} holds no images")
    return CheckedImages(images, split, options.on_bad_image == "skip", record, _mode(options))


def _check_class_map(path: str) -> None:
    """Raises UsageError: a line names no class, or one that an earlier line has named."""
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"--class-map: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    for number, name in enumerate(names):
        if not name:
            raise UsageError(f"--class-map: line {number + 1} of {path} is empty; write the name of a class per line")
        if name in names[:number]:
            raise UsageError(f"--class-map: line {number + 1} of {path} repeats {name!r}; name each class once")


def _reading(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "class_map": options.class_map or None,
        "seed": getattr(options, "seed", 42),
        "input_img_mode": _mode(options),
    }


def _mode(options: argparse.Namespace) -> str:
    """Pillow's, of the images."""
    return "L" if getattr(options, "in_chans", None) == 1 else "RGB"


def number_of_classes(options: argparse.Namespace, train: Any, validation: Any | None) -> int:
    """--num-classes, or the number of classes in the data.

    Raises:
        UsageError: these two, or the two splits, do not agree; or there is neither.
    """
    names = class_names(train)
    if names is None:
        if options.num_classes is None:
            raise UsageError("--num-classes: missing, and the data does not name its classes; pass their number")
        return int(options.num_classes)
    if options.num_classes is not None and options.num_classes != len(names):
        raise UsageError(
            f"--num-classes: {options.num_classes}, but {options.train_split!r} has {len(names)} classes "
            f"({some(names)}); pass {len(names)}, or a --class-map that gives each its index"
        )
    other = names if validation is None else class_names(validation)
    if other is not None and other != names:
        raise UsageError(
            f"--data-dir: {options.train_split!r} has the classes {some(names)}, {options.val_split!r} has "
            f"{some(other)}; labels would not mean the same: make the folders agree, or pass --class-map"
        )
    return len(names)


def make_loaders(
    options: argparse.Namespace,
    train: Any,
    validation: Any | None,
    config: dict[str, Any],
    num_classes: int,
    device: Any,
    distributed: bool = False,
    held_out: Any | None = None,
) -> Data:
    """Timm's loaders for the student's input, with Mixup in the collation as timm's train.py has it.

    Args:
        options: of `train.options`.
        train: the split to learn from.
        validation: the one to be judged by.
        config: timm's data configuration.
        num_classes: of the student.
        device: of the batches.
        distributed: whether this rank takes its share of the samples; as timm does, an epoch's order is then drawn
            from its number.
        held_out: training images that are not trained on.

    Raises:
        UsageError: there are fewer images than one batch takes, or an odd batch with Mixup, or a stream where samples
            need numbers.
    """
    stream = isinstance(train, IterableDataset)
    if stream and (distributed or options.aug_repeats):
        wanted = "--aug-repeats" if options.aug_repeats else "torchrun"
        raise UsageError(f"{wanted}: --dataset {options.dataset} is a stream, whose samples have no number")
    if options.aug_repeats and options.aug_repeats < 1:
        raise UsageError(f"--aug-repeats: {options.aug_repeats:g}; pass 0, or a number from 1 on, such as 3")
    mixup = None
    if options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None:
        if options.batch_size % 2:
            raise UsageError(f"--batch-size: {options.batch_size}; Mixup pairs images: pass an even one")
        chosen = _given(options, _MIXED)
        mixup = FastCollateMixup(**chosen, label_smoothing=options.smoothing, num_classes=num_classes)
    keyed = None
    if options.kd_cache_teacher:
        if stream or options.aug_repeats:
            wanted = "--aug-repeats" if options.aug_repeats else f"--dataset {options.dataset} is a stream"
            raise UsageError(
                f"--kd-cache-teacher: {wanted}: an image would not be a function of its number and its augmentation's; "
                "leave one of them out"
            )
        train = keyed = KeyedDataset(train, seed_of(options))
    repeats = int(options.aug_repeats) if options.aug_repeats == int(options.aug_repeats) else options.aug_repeats
    loader = create_loader(
        train,
        batch_size=options.batch_size,
        is_training=True,
        collate_fn=mixup if keyed is None else KeyedCollate(mixup, keyed.seed),
        num_aug_repeats=repeats if distributed else 0,
        **_given(options, _AUGMENTED),
        **({} if keyed else _given(options, _ERASED)),
        **_loading(options, config, device, distributed),
    )
    batches = None
    if not stream:
        order: Any = None
        if keyed is not None:
            order = _order(options, keyed, mixup is not None, distributed)
        elif repeats and not distributed:
            # timm repeats over ranks only; here the copies of an image are in one batch
            alone = RepeatAugSampler(train, 1, 0, num_repeats=repeats)
            order = BatchSampler(alone, options.batch_size, drop_last=True)
        loader.loader = batches = Batches(loader.loader, order)
        if len(loader) == 0:
            raise UsageError(
                f"--batch-size: {options.batch_size}, but {options.train_split!r} holds {len(train)} images"
                f"{', of which each rank has a part' if distributed else ''}; pass a smaller one"
            )
    cached = None
    if keyed is not None:
        cached = cached_images(options, order, _told(options, keyed, config, mixup is not None, device))
        if options.reprob:
            erasing = RandomErasing(options.reprob, mode=options.remode, max_count=options.recount, device=device)
            loader = ErasedLoader(loader, erasing, keyed.seed)
    checked = None if validation is None else validation_loader(options, validation, config, device, distributed)
    held = None
    if held_out is not None:
        looked_at = _in_batches(options, held_out, dist.get_world_size() if distributed else 1)
        held = validation_loader(options, looked_at, config, device, distributed, training=True)
    return Data(loader, checked, mixup, cached, batches, held)


def _in_batches(options: argparse.Namespace, held_out: Any, ranks: int) -> Any:
    """The held-out images without a last batch of one: normalization by the batch has nothing to compare there.

    Raises:
        UsageError: each rank has one image.
    """
    each = -(-len(held_out) // ranks)
    if options.batch_size == 1 or each % options.batch_size != 1:
        return held_out
    if each == 1:
        raise UsageError(
            f"--kd-held-out: {options.kd_held_out:g} of the images are {len(held_out)}, one for each of {ranks} "
            "processes; hold out two at least for each"
        )
    return held_out.part(held_out.positions[: (each - 1) * ranks])


def _order(options: argparse.Namespace, keyed: KeyedDataset, mixes: bool, distributed: bool) -> KeyedOrder:
    ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    off = options.mixup_off_epoch if mixes else 0
    group = 2 if mixes else 1
    return KeyedOrder(
        len(keyed), options.batch_size, keyed.seed, options.kd_cache_views, group, off, rank=ranks[0], size=ranks[1]
    )


def _told(
    options: argparse.Namespace, keyed: KeyedDataset, config: dict[str, Any], mixes: bool, device: Any
) -> dict[str, Any]:
    """What the images depend on, by the names that messages use."""
    tables = [_AUGMENTED, *([_MIXED] if mixes else []), *([_ERASED] if options.reprob else [])]
    names = ["dataset", "train_split", "on_bad_image", *(option for table in tables for option in table.values())]
    told = {flag(name): getattr(options, name) for name in names}
    told |= {f"image {name}": config[name] for name in ("input_size", "mean", "std")}
    if options.reprob and options.remode != "const":
        told["device of the erasing's noise"] = device.type
    return {**told, "training data (sha256)": identity_of(options, keyed) or options.dataset}


def validation_loader(
    options: argparse.Namespace,
    images: Any,
    config: dict[str, Any],
    device: Any,
    distributed: bool = False,
    training: bool = False,
) -> Any:
    """Timm's loader without augmentation; of this rank's share of the samples, if there are several.

    Args:
        options: of `train.options`.
        images: the data set.
        config: timm's data configuration.
        device: of the batches.
        distributed: whether there are several ranks.
        training: with the batch size of training instead of --validation-batch-size.
    """
    return create_loader(
        images,
        batch_size=options.batch_size if training else options.validation_batch_size or options.batch_size,
        is_training=False,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        **_loading(options, config, device, distributed),
    )


def _given(options: argparse.Namespace, table: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of timm by a table from their names to options."""
    return {argument: getattr(options, option) for argument, option in table.items()}


def _loading(options: argparse.Namespace, config: Mapping[str, Any], device: Any, distributed: bool) -> dict[str, Any]:
    """What timm's loaders of all splits take."""
    return {
        **{name: config[name] for name in ("input_size", "mean", "std")},
        "num_workers": options.workers,
        "pin_memory": options.pin_mem,
        "device": device,
        "distributed": distributed,
        # a worker that lived on would keep its random state beyond the checkpoint
        "persistent_workers": False,
        "worker_seeding": worker_seed,
    }
