"""What a split of the data holds, and what of it is passed over: a line or an error before training."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from timm.data.readers.img_extensions import add_img_extensions, get_img_extensions

from ..errors import UsageError

#: Formats that Pillow reads without further programs, besides timm's .png, .jpg and .jpeg; of an animation the first
#: image.
FORMATS = (".apng", ".bmp", ".gif", ".jfif", ".jpe", ".pbm", ".pgm", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
add_img_extensions([name for name in FORMATS if name not in get_img_extensions()])


def class_names(images: Any) -> list[str] | None:
    """The classes in the order of their indices, where the data has names."""
    inner = getattr(images, "images", images)
    for owner in (getattr(inner, "reader", None), inner):
        for name in ("class_to_idx", "class_name_to_idx"):  # the second of tar files
            found = getattr(owner, name, None)
            if found:
                return [str(key) for key in sorted(found, key=found.__getitem__)]
    return None


def some(names: list[str]) -> str:
    """The first few of them."""
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")


def examine(images: Any, split: str) -> str:
    """A line on what a split holds: images, classes, and the files that are passed over.

    Args:
        images: the data set.
        split: its name.

    Raises:
        UsageError: a class has no image, or an image no class.
    """
    if not hasattr(images, "__len__"):
        return f"{split}: a stream of images"
    names = class_names(images)
    line = f"{split}: {len(images)} images"
    if names is not None:
        line += f" of {len(names)} {'class' if len(names) == 1 else 'classes'} ({some(names)})"
    inner = getattr(images, "images", images)
    reader = getattr(inner, "reader", inner)
    root, samples = getattr(reader, "root", None), getattr(reader, "samples", None)
    if root is None or samples is None or not os.path.isdir(root) or not isinstance(samples[0][0], str):
        return line
    passed, nested = _walk(root, split, {path for path, _ in samples})
    if names is not None:
        counts = Counter(index for _, index in samples)
        empty = [name for index, name in enumerate(names) if index not in counts]
        if empty:
            raise UsageError(
                f"--data-dir: {split!r} has no image of {some(empty)}; add some, or take the name out of --class-map"
            )
    if nested:
        line += "; folders lie in folders, and the innermost name the classes"
    if passed:
        line += f"; passed over: {', '.join(f'{count} {kind}' for kind, count in sorted(passed.items()))}"
    return line


def _walk(root: str, split: str, used: set[str]) -> tuple[Counter[str], bool]:
    """The files that are not used, counted by kind, and whether class folders lie in other folders.

    Args:
        root: of the split.
        split: its name.
        used: paths that begin with `root`, as os.walk makes them too.

    Raises:
        UsageError: as `examine`.
    """
    passed: Counter[str] = Counter()
    of_class: dict[str, Counter[str]] = {}
    with_images = set()
    nested = False
    for folder, folders, files in os.walk(root, followlinks=True):
        parts = Path(folder).relative_to(root).parts
        own = [name for name in files if os.path.join(folder, name) in used]
        others = Counter(_kind(name) for name in files if os.path.join(folder, name) not in used)
        if not parts:
            of_class = {name: Counter() for name in folders if not name.startswith(".")}
            if own:
                raise UsageError(
                    f"--data-dir: {len(own)} images lie in {root} itself, outside of any class folder, such as "
                    f"{own[0]!r}; move them into folders that are named as their classes"
                )
        elif own and any(part.startswith(".") for part in parts):
            raise UsageError(
                f"--data-dir: the hidden folder {folder} holds {len(own)} images, which would be a class; remove it"
            )
        elif parts[0] in of_class:
            of_class[parts[0]] += others
        if parts and any(_extension(name) in get_img_extensions() for name in files):
            with_images.add(parts[0])
        nested |= bool(own) and len(parts) > 1
        passed += others
    for name in sorted(of_class.keys() - with_images):
        held = ", ".join(f"{count} {kind}" for kind, count in sorted(of_class[name].items())) or "nothing"
        raise UsageError(
            f"--data-dir: the folder {os.path.join(root, name)} of {split!r} would be a class, but has no image of a "
            f"known format ({held}); known are {', '.join(sorted(get_img_extensions()))}: convert them, or remove the "
            "folder"
        )
    return passed, nested


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _kind(name: str) -> str:
    extension = _extension(name)
    if extension in get_img_extensions():
        return f"{extension} of classes that --class-map does not name"
    return extension or "files without an extension"
