"""COCO's annotation file: read, and every field that something reads later checked, before training starts.

What goes on is a content of our own with nothing else in it: images, objects and categories have numbers that
pycocotools can count on, whatever the file calls them. It takes object 0 for none, an object's id that comes twice for
the last one that has it, and keeps ids of images as float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..texts import parse_json
from .boxes import Counts, check_boxes, count_boxes, usable

#: What a file calls an image or a category.
Identity = int | str
Entry = dict[str, Any]


@dataclass(frozen=True)
class Annotations:
    """A split's annotation file.

    Attributes:
        path: the file.
        content: for pycocotools: "images" with "id" from 0 in the file's order, "file_name", "width", "height";
            "annotations" with "id" from 1 in the file's order, "image_id", "category_id", "bbox", "area", "iscrowd";
            "categories" with "id", the label, and "name".
        image_ids: the file's, by ours.
        categories: name by the file's id, in the order of the ids; a label is the position in it.
        boxes: what can be learned.
        empty: images without a box that can be learned.
        most: objects of the fullest image.
        repeated: images of a file that another image has too.
    """

    path: Path
    content: dict[str, list[Entry]]
    image_ids: list[Identity]
    categories: dict[Identity, str]
    boxes: Counts
    empty: int
    most: int
    repeated: int

    def part(self, numbers: Sequence[int]) -> Annotations:
        """The images with these numbers alone, each once, in this order; numbered anew, and so are their objects."""
        numbers = list(dict.fromkeys(numbers))  # one may stand in for another that cannot be read
        place = {number: index for index, number in enumerate(numbers)}
        images = [{**self.content["images"][number], "id": index} for number, index in place.items()]
        objects = [
            {**a, "image_id": place[a["image_id"]]} for a in self.content["annotations"] if a["image_id"] in place
        ]
        for index, a in enumerate(objects):
            a["id"] = index + 1
        return _annotations(self.path, images, objects, [self.image_ids[number] for number in numbers], self.categories)


def read_annotations(path: Path, images: Path) -> Annotations:
    """Read and check one split.

    Missing is repaired as COCO's tools do: `area` is the box's, `iscrowd` is 0. Ids of annotations are not read.

    Args:
        path: the JSON file.
        images: the folder that holds its images.

    Raises:
        UsageError: no such file, not COCO's format, an image that is not there, an annotation of an image or a
            category that the file does not know, a field that is no number, or boxes of another format.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"--annotations: {path} cannot be read: {error.strerror}; see --data-dir too") from error
    except ValueError as error:
        raise UsageError(f"--annotations: {path} is no JSON: {error}") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise UsageError(f"--annotations: {path} has no lists images, annotations and categories, as COCO's files have")
    reader = _Reader(path)
    found, numbers = reader.images(content["images"])
    categories = reader.categories(content["categories"])
    names = [image["file_name"] for image in found]
    _check_files(path, names, images)
    labels = {category: label for label, category in enumerate(categories)}
    objects = reader.annotations(content["annotations"], numbers, labels)
    whole = _annotations(path, found, objects, list(numbers), categories)
    check_boxes(path, objects, found)
    if whole.empty == len(found):
        raise UsageError(f"--annotations: {path} has no box to learn from or to judge by")
    return whole


def _annotations(
    path: Path, images: list[Entry], objects: list[Entry], ids: list[Identity], categories: dict[Identity, str]
) -> Annotations:
    objects_of = [0] * len(images)
    for a in objects:
        objects_of[a["image_id"]] += usable(a, images[a["image_id"]])
    names = [image["file_name"] for image in images]
    own = [{"id": label, "name": name} for label, name in enumerate(categories.values())]
    return Annotations(
        path,
        {"images": images, "annotations": objects, "categories": own},
        ids,
        categories,
        count_boxes(objects, images),
        empty=objects_of.count(0),
        most=max(objects_of),
        repeated=len(names) - len(set(names)),
    )


def _check_files(path: Path, names: list[str], folder: Path) -> None:
    # one look at each folder, not one at each file
    there = {str(p) for p in {(folder / name).parent for name in names}}
    held = {str(p) for parent in there if Path(parent).is_dir() for p in Path(parent).iterdir()}
    missing = [name for name in names if str(folder / name) not in held]
    if missing:
        raise UsageError(
            f"--data-dir: {len(missing)} of {len(names)} images of {path} are not in {folder}, the first is "
            f"{missing[0]}; restore them, remove them from the file, or name the folder with --train-split, --val-split"
        )


class _Reader:
    """Takes the three lists of a file apart; what cannot be read is refused with the place where it stands."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _refuse(self, where: str, what: str) -> UsageError:
        return UsageError(f"--annotations: {self._path}: {where} {what}")

    def _entries(self, name: str, entries: list[Any]) -> Iterator[tuple[str, Entry]]:
        for index, entry in enumerate(entries):
            where = f"{name}[{index}]"
            if not isinstance(entry, dict):
                raise self._refuse(where, f"is {_shown(entry)}, not an object with fields; remove it")
            yield where, entry

    def _identity(self, where: str, entry: Entry, key: str = "id") -> Identity:
        value = entry.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise self._refuse(where, f"has the {key} {_shown(value)}; write a whole number or a text")
        return value

    def images(self, entries: list[Any]) -> tuple[list[Entry], dict[Identity, int]]:
        """What is read of them, and our number of each by its id."""
        found: list[Entry] = []
        numbers: dict[Identity, int] = {}
        for where, image in self._entries("images", entries):
            identity, name = self._identity(where, image), image.get("file_name")
            if identity in numbers:
                raise self._refuse(
                    where,
                    f"has the id {identity!r} of images[{numbers[identity]}]; several images of one id cannot be told "
                    "apart: give each its own, also in its annotations",
                )
            if not isinstance(name, str) or not name:
                raise self._refuse(where, f"has the file_name {_shown(name)}; write the file's name in the folder")
            sides = {}
            for key in ("width", "height"):
                side = _number(image.get(key))
                if side is None or side < 1 or not side.is_integer():
                    raise self._refuse(
                        f"{where} ({name})",
                        f"has the {key} {_shown(image.get(key))}; widths and heights must be whole numbers, in pixels",
                    )
                sides[key] = int(side)
            numbers[identity] = len(found)
            found.append({"id": len(found), "file_name": name, **sides})
        if not found:
            raise UsageError(f"--annotations: {self._path} has no images")
        return found, numbers

    def categories(self, entries: list[Any]) -> dict[Identity, str]:
        """Names by id, in the order of the ids: numbers, then texts."""
        found: dict[Identity, str] = {}
        for where, category in self._entries("categories", entries):
            identity, name = self._identity(where, category), category.get("name")
            if identity in found:
                raise self._refuse(where, f"has the id {identity!r} of another category; give each its own")
            if isinstance(name, bool) or not isinstance(name, (str, int, float)) or name == "":
                raise self._refuse(where, f"has the name {_shown(name)}; write a text")
            found[identity] = str(name)
        if not found:
            raise UsageError(f"--annotations: {self._path} has no categories")
        return dict(sorted(found.items(), key=lambda pair: (isinstance(pair[0], str), pair[0])))

    def annotations(self, entries: list[Any], images: dict[Identity, int], labels: dict[Identity, int]) -> list[Entry]:
        """Objects with ids from 1 and our numbers of image and category."""
        found: list[Entry] = []
        for where, a in self._entries("annotations", entries):
            if "id" in a:
                where += f" (id {_shown(a['id'])})"
            of = {}
            for key, known in (("image_id", images), ("category_id", labels)):
                identity = self._identity(where, a, key)
                if identity not in known:
                    kind = key.removesuffix("_id")
                    raise self._refuse(
                        where,
                        f"is of {kind} {identity!r}, which the file does not list; correct the {key} (a number and a "
                        "text are two ids), or remove the annotation",
                    )
                of[key] = known[identity]
            box = a.get("bbox")
            numbers = [_number(value) for value in box] if isinstance(box, list) else []
            bbox = [value for value in numbers if value is not None]
            if len(numbers) != 4 or len(bbox) != 4:
                raise self._refuse(
                    where, f"has no bbox of x, y, width, height, four numbers in pixels, but {_shown(box)}"
                )
            area = a.get("area")
            area = max(bbox[2], 0) * max(bbox[3], 0) if area is None else _number(area)
            if area is None or area < 0:
                raise self._refuse(
                    where, f"has the area {_shown(a['area'])}; write its pixels, or leave it out: then it is the box's"
                )
            crowd = a.get("iscrowd")
            if crowd not in (None, 0, 1) or isinstance(crowd, str):
                raise self._refuse(where, f"has the iscrowd {_shown(crowd)}; write 0 or 1, or leave it out for 0")
            more = {"bbox": bbox, "area": area, "iscrowd": int(crowd or 0)}
            found.append({"id": len(found) + 1, **of, **more})
        return found


def _number(value: Any) -> float | None:
    """A finite one; JSON's true is none, nor are its NaN and Infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    """As the file has it, cut to a few words."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
