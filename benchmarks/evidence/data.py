"""Three sets of real images that ship in packages, each with a teacher's outputs for its training images, and variants.

The teacher is frozen and the training images are a fixed pool of distorted copies, so it looks at each of them once.
Training, validation and test images come of different originals: learning rates and weights are chosen on the
validation images, the test images judge.
"""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm
import torch
import torch.nn.functional as F
from dtokd.demo.data import distort, mnist_5k
from dtokd.detect.demo import imagenet_weights
from dtokd.objectives.taps import Taps, read
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ..digits import Images, accuracy, make_model, seeded, train_teacher

PACKAGES = "make evidence installs it"
TEACHER_ITERATIONS, TEACHER_COPIES, STUDENT_COPIES, JUDGED_COPIES = 650, 8, 24, 2
#: Photos and micrographs in scikit-image whose parts look alike enough to be told from other photos'.
PHOTOS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "microaneurysms.png", "moon.png", "motorcycle_left.png", "page.png"),
    *("retina.jpg", "rocket.jpg"),
)
CROPS, JUDGED_CROPS, TEACHER_PIXELS, STUDENT_PIXELS = 250, 120, 96, 32
#: Height of a photo, in pixels, and the side of the square tiles it is cut into.
PHOTO_PIXELS, TILE = 384, 96
#: Shares of each photo's tiles: what is learned, what is chosen on, what is tested on.
TILES = {"train": 0.5, "validation": 0.2, "test": 0.3}


@dataclass(frozen=True)
class DataSet:
    """One data set as the students see it.

    Attributes:
        images, labels: the pool for training, [N, C, H, W] float32 in [-1, 1] and [N] int64.
        logits, features: the teacher's for that pool, [N, classes] and [N, width] float32.
        validation_images, validation_labels, test_images, test_labels: the same for choosing and for judging.
        teacher_accuracy, teacher_validation: [] float64, of the teacher on the test and on the validation images.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    features: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    teacher_accuracy: Tensor
    teacher_validation: Tensor

    @property
    def validation(self) -> Images:
        """What settings are chosen on."""
        return Images(self.validation_images, self.validation_labels)

    @property
    def test(self) -> Images:
        """What judges."""
        return Images(self.test_images, self.test_labels)


def load(name: str, folder: Path) -> DataSet:
    """A data set of `MAKERS`, `VARIANTS` or `SAME`.

    Args:
        name: which.
        folder: where it is read from if it was made before (by whatever code: empty it after changes), else written.

    Raises:
        ModuleNotFoundError: a package with images is not installed.
    """
    name = SAME.get(name, name)
    path = folder / f"{name}.safetensors"
    if not path.exists():
        made = VARIANTS[name](lambda base: load(base, folder)) if name in VARIANTS else MAKERS[name]()
        folder.mkdir(parents=True, exist_ok=True)
        save_file({f.name: getattr(made, f.name).contiguous() for f in fields(made)}, path)
    return DataSet(**load_file(path))


@dataclass(frozen=True)
class Silhouettes:
    """Distorted copies of small grey images: the teacher's, the students', and those to choose on and to test on."""

    taught: Images
    pool: Images
    validation: Images
    test: Images


def draw_silhouettes(name: str) -> Silhouettes:
    """The images of "digits" (MNIST-5k) or "animals" (silhouettes of ten animals)."""
    read, counts = _SILHOUETTES[name]
    images, labels = read()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)

    def distorted(index: Tensor, copies: int) -> Images:
        index = index.repeat(copies)
        return Images(distort(images[index], generator) * 2 - 1, labels[index])

    end = counts["teacher"] + counts["validation"]
    return Silhouettes(
        distorted(order[: counts["teacher"]], TEACHER_COPIES),
        distorted(order[: counts["student"]], STUDENT_COPIES),
        distorted(order[counts["teacher"] : end], JUDGED_COPIES),
        distorted(order[end : end + counts["test"]], JUDGED_COPIES),
    )


def silhouettes_teacher(taught: Images) -> nn.Module:
    """A network that was trained on these images."""
    with seeded(0):
        model = make_model("teacher")
    train_teacher(model, taught, iterations=TEACHER_ITERATIONS, seed=0)
    return model


def _silhouettes(name: str) -> DataSet:
    parts = draw_silhouettes(name)
    model = silhouettes_teacher(parts.taught)
    return DataSet(
        parts.pool.images,
        parts.pool.labels,
        *_outputs(model, parts.pool.images),
        parts.validation.images,
        parts.validation.labels,
        parts.test.images,
        parts.test.labels,
        *(torch.tensor(accuracy(model, images), dtype=torch.float64) for images in (parts.test, parts.validation)),
    )


def _outputs(teacher: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """A teacher's logits and pooled features."""
    with torch.no_grad():
        parts = [read(teacher, part, Taps(logits=True, pooled="head")) for part in images.split(500)]
    return (
        torch.cat([part.logits for part in parts if part.logits is not None]),
        torch.cat([part.pooled for part in parts if part.pooled is not None]),
    )


def wrong_teacher(base: DataSet) -> DataSet:
    """A teacher that takes each class for the next one."""
    wrong = base.logits.roll(1, 1)
    right = (wrong.argmax(1) == base.labels).double().mean()
    return replace(base, logits=wrong, teacher_accuracy=right, teacher_validation=right.clone())


def weak_teacher(base: DataSet, iterations: int) -> DataSet:
    """A teacher that was trained for so few iterations, on the students' images; for 0, as it was drawn."""
    with seeded(1):
        model = make_model("teacher").eval()
    if iterations:
        train_teacher(model, Images(base.images, base.labels), iterations=iterations, seed=1)
    logits, features = _outputs(model, base.images)
    test, validation = (
        torch.tensor(accuracy(model, part), dtype=torch.float64) for part in (base.test, base.validation)
    )
    return replace(base, logits=logits, features=features, teacher_accuracy=test, teacher_validation=validation)


def few_images(base: DataSet, originals: int, of: int) -> DataSet:
    """The copies of the first `originals` of the students' `of` originals; the teacher is the same."""
    kept = torch.arange(len(base.labels)) % of < originals
    pool = {name: getattr(base, name)[kept] for name in ("images", "labels", "logits", "features")}
    return replace(base, **pool)


def photos() -> DataSet:
    """Which of 16 photos a crop of 32 x 32 pixels was taken from; the teacher sees it with 96 x 96.

    The teacher is an ImageNet MobileNetV2 with a linear classifier, fitted to its features of the training crops. Crops
    of the three parts come from different tiles of each photo: this is recognition of a scene from parts not seen, not
    of categories.
    """
    crops = photo_crops()
    network = imagenet_mobilenet()
    features = {part: mobilenet_features(network, images) for part, (images, _) in crops.items()}
    classifier = fit_classifier(features["train"], crops["train"][1])
    with torch.no_grad():
        logits = {part: classifier(features[part]) for part in features}
    small = {part: shrunk(images) * 2 - 1 for part, (images, _) in crops.items()}
    right = {part: (logits[part].argmax(1) == crops[part][1]).double().mean() for part in ("test", "validation")}
    return DataSet(
        small["train"],
        crops["train"][1],
        logits["train"],
        features["train"],
        small["validation"],
        crops["validation"][1],
        small["test"],
        crops["test"][1],
        right["test"],
        right["validation"],
    )


def shrunk(crops: Tensor) -> Tensor:
    """Crops [N, 3, 96, 96] as the student sees them, [N, 3, 32, 32]."""
    return F.avg_pool2d(crops, TEACHER_PIXELS // STUDENT_PIXELS)


def photo_crops() -> dict[str, tuple[Tensor, Tensor]]:
    """Crops [N, 3, 96, 96] in [0, 1] and the photos' numbers [N], of each part of `TILES`."""
    tiles = [_tiles(photo) for photo in _photos()]
    return {part: _crops([of[part] for of in tiles], part, count) for part, count in _COUNTS.items()}


_COUNTS = {"train": CROPS, "validation": JUDGED_CROPS, "test": JUDGED_CROPS}


def _crops(tiles_of: Sequence[Tensor], part: str, count: int) -> tuple[Tensor, Tensor]:
    """`count` crops of each photo, [N, 3, 96, 96] in [0, 1], and the photos' numbers.

    Args:
        tiles_of: each photo's tiles of this part, [tiles, 3, 96, 96].
        part: of `TILES`; it seeds the draws.
        count: for each photo.
    """
    generator = torch.Generator().manual_seed(list(TILES).index(part))

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    crops = []
    for tiles in tiles_of:
        for _ in range(count):
            tile = tiles[int(between(0, len(tiles)))]
            side = round(between(0.6, 1.0) * TILE)
            top, left = (int(between(0, TILE - side + 1)) for _ in range(2))
            crop = tile[None, :, top : top + side, left : left + side]
            crop = F.interpolate(crop, (TEACHER_PIXELS,) * 2, mode="bilinear", antialias=True, align_corners=False)
            crop = (crop - crop.mean()) * between(0.5, 1.3) + crop.mean() + between(-0.25, 0.25)
            if between(0, 1) < 0.5:
                crop = crop.flip(3)
            noise = torch.randn(crop.shape, generator=generator) * between(0, 0.15)
            crops.append((crop + noise).clamp(0, 1))
    return torch.cat(crops), torch.arange(len(PHOTOS)).repeat_interleave(count)


def _tiles(photo: Tensor) -> dict[str, Tensor]:
    """A photo's tiles, [N, 3, 96, 96], dealt at random to the three parts."""
    tiles = photo.unfold(1, TILE, TILE).unfold(2, TILE, TILE).flatten(1, 2).movedim(0, 1)
    order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(0))
    ends = [round(len(tiles) * share) for share in (TILES["train"], TILES["train"] + TILES["validation"])]
    parts = zip(TILES, order.tensor_split(ends), strict=True)
    return {part: tiles[index] for part, index in parts}


def _photos() -> list[Tensor]:
    """The photos, [3, H, W] in [0, 1], all of one height."""
    import imageio.v3 as imageio

    found = []
    for name in PHOTOS:
        pixels = np.asarray(imageio.imread((_package("skimage") / "data" / name).read_bytes()))
        pixels = np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels[..., :3]
        image = torch.from_numpy(pixels.copy()).movedim(2, 0)[None].float() / 255
        size = [PHOTO_PIXELS, round(PHOTO_PIXELS * image.shape[3] / image.shape[2])]
        found.append(F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)[0])
    return found


def imagenet_mobilenet() -> nn.Module:
    """The teacher's network without its classifier: images, normalised as ImageNet's, to [B, 1280]."""
    model = timm.create_model("mobilenetv2_100")
    model.load_state_dict(imagenet_weights())
    model.reset_classifier(0)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def mobilenet_features(network: nn.Module, images: Tensor) -> Tensor:
    """The network's [N, 1280] of images [N, 3, H, W] in [0, 1]."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return torch.cat([network((part - mean) / std) for part in images.split(100)])


def fit_classifier(features: Tensor, labels: Tensor) -> nn.Linear:
    """A linear classifier: ridge-regularised softmax regression by L-BFGS."""
    with seeded(0):
        classifier = nn.Linear(features.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(features), labels) + 1e-4 * classifier.weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    return classifier.requires_grad_(False)


def animal_mnist() -> tuple[Tensor, Tensor]:
    """The package's 10 000 images [N, 1, 28, 28] in [0, 1], and their labels.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    folder = _package("animal_mnist") / "data" / "Animal_MNIST"
    packed = [(folder / f"animal_{kind}_version_3.gz").read_bytes() for kind in ("data", "label")]
    images, labels = (torch.from_numpy(_Arrays(BytesIO(gzip.decompress(part))).load()) for part in packed)
    return images.view(-1, 1, 28, 28).float() / 255, labels.long().flatten()


class _Arrays(pickle.Unpickler):
    """Of a pickle it reads plain numpy arrays and refuses all else."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.array(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"animal_mnist: its file holds {module}.{name}, not only arrays")
        return self._ALLOWED[module, name]


def _package(name: str) -> Any:
    try:
        return files(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name}: not installed, but its files are the data; {PACKAGES}") from error


#: How images are read, and how many: the students' are among the teacher's.
_SILHOUETTES: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], dict[str, int]]] = {
    "digits": (mnist_5k, {"student": 500, "teacher": 3000, "validation": 800, "test": 1200}),
    "animals": (animal_mnist, {"student": 1000, "teacher": 6000, "validation": 1500, "test": 2500}),
}
#: How each data set is made.
MAKERS: dict[str, Callable[[], DataSet]] = {
    **{name: partial(_silhouettes, name) for name in _SILHOUETTES},
    "photos": photos,
}
Load = Callable[[str], DataSet]
#: The same with something changed, made from the data set that they are given.
VARIANTS: dict[str, Callable[[Load], DataSet]] = {
    "digits, wrong teacher": lambda load: wrong_teacher(load("digits")),
    "animals, random teacher": lambda load: weak_teacher(load("animals"), 0),
    "animals, weak teacher": lambda load: weak_teacher(load("animals"), 40),
    "digits, few images": lambda load: few_images(load("digits"), 50, of=500),
    "animals, few images": lambda load: few_images(load("animals"), 100, of=1000),
    "digits, weak teacher": lambda load: weak_teacher(load("digits"), 40),
    "photos, wrong teacher": lambda load: wrong_teacher(load("photos")),
}
#: The same images and teacher, for other students and for more iterations.
SAME = {
    **dict.fromkeys(("digits, long", "digits, smaller student"), "digits"),
    **dict.fromkeys(("photos, long", "photos, another student"), "photos"),
    "animals, larger student": "animals",
}
