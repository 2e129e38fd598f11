"""The teacher's outputs on disk: the same numbers, no forward pass, and never another teacher's or image's."""

import argparse
import gc
import random
import shutil
import weakref

import numpy as np
import pytest
import timm
import torch
from dtokd import files, identity
from dtokd.cli import main
from dtokd.objectives.build import build, use_cache
from dtokd.objectives.cache import KeyedDataset, TeacherCache
from dtokd.objectives.options import add_arguments
from dtokd.objectives.taps import Taps
from dtokd.objectives.teacher import Normalisation, Teacher
from dtokd.train.images import CheckedImages
from safetensors.torch import load_file, save_file
from timm.data import create_dataset
from torch import nn
from torch.utils.data import DataLoader

from .digits import common, distilling, write_digits

#: timm's reader leaves files to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

TAPS = Taps(logits=True, pooled="head", stages=(3, 4))


class Noisy:
    """Six images whose augmentation draws from all three global generators."""

    transform = "noise"

    def __len__(self):
        return 6

    def __getitem__(self, index):
        noise = torch.randn(3, 32, 32) + np.random.standard_normal() + random.random()
        return index + noise, index % 5


def make_teacher(seed=0, dtype=None):
    torch.manual_seed(seed)
    return Teacher(timm.create_model("test_resnet", num_classes=5), "t", Normalisation(), dtype=dtype)


def batch_of(dataset, indices):
    images, _, keys = zip(*[dataset[i] for i in indices], strict=True)
    return torch.stack(images), torch.stack(keys)


def test_an_image_is_a_function_of_sample_and_view():
    data = KeyedDataset(Noisy(), seed=3, views=2)
    torch.manual_seed(0)
    state = torch.get_rng_state(), random.getstate()
    first = data[1][0]
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert torch.equal(data[1][0], first)
    assert not torch.equal(data[2][0] - 1, first)
    assert data[1][2].tolist() == [1, 0]
    data.set_epoch(1)
    assert not torch.equal(data[1][0], first)
    data.set_epoch(2)
    assert torch.equal(data[1][0], first)
    assert not torch.equal(KeyedDataset(Noisy(), seed=4)[1][0], first)
    forever = KeyedDataset(Noisy(), views=0)
    forever.set_epoch(9)
    assert forever[0][2].tolist() == [0, 9]
    with pytest.raises(ValueError, match="views is -1"):
        KeyedDataset(Noisy(), views=-1)


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_see_the_same_images(workers):
    data = KeyedDataset(Noisy())
    images, _, keys = next(iter(DataLoader(data, batch_size=6, num_workers=workers)))
    assert torch.equal(images, batch_of(data, range(6))[0])
    assert keys[:, 0].tolist() == list(range(6))


def test_the_same_numbers_without_a_forward_pass(tmp_path):
    data, teacher = KeyedDataset(Noisy()), make_teacher()
    images, keys = batch_of(data, [0, 1, 2, 3])
    cache = TeacherCache(tmp_path, teacher, TAPS, data, shard=3)
    expected = teacher(images, TAPS)
    for given in (cache(teacher, images, TAPS, keys), cache(None, images, TAPS, keys)):
        for got, want in zip([*given[:3], *given.maps], [*expected[:3], *expected.maps], strict=True):
            assert got is want is None or torch.equal(got, want)
    cache.flush()
    # another process, in another order, with two samples that are new
    images, keys = batch_of(data, [5, 2, 0, 4])
    again = TeacherCache(tmp_path, teacher, TAPS, data)
    got = again(teacher, images, TAPS, keys)
    torch.testing.assert_close(got.logits, teacher(images, TAPS).logits)
    assert (again.hits, again.misses) == (2, 2)


def test_what_is_written_leaves_memory_and_another_process_finds_it(tmp_path):
    data, teacher = KeyedDataset(Noisy()), make_teacher()
    first, second = (TeacherCache(tmp_path, teacher, TAPS, data) for _ in range(2))
    images, keys = batch_of(data, range(3))
    expected = first(teacher, images, TAPS, keys)
    computed = weakref.ref(first._rows[0, 0][0]["logits"])
    first.flush()
    gc.collect()
    assert computed() is None
    second.refresh()
    for cache in (first, second):
        assert torch.equal(cache(None, images, TAPS, keys).logits, expected.logits)


def test_shards_are_whole_and_what_is_pending_is_written_at_the_end(tmp_path):
    data, teacher = KeyedDataset(Noisy()), make_teacher()
    cache = TeacherCache(tmp_path, teacher, TAPS, data, shard=100)
    cache(teacher, *[batch_of(data, range(6))[0]], TAPS, batch_of(data, range(6))[1])
    folder = cache.directory
    assert not list(folder.glob("*.safetensors"))
    del cache
    (shard,) = folder.glob("*.safetensors")
    assert load_file(shard)["key"].tolist() == [[i, 0] for i in range(6)]
    assert not list(folder.glob(".*"))


def flipped(content):
    return content[:-5] + bytes([content[-5] ^ 64]) + content[-4:]


@pytest.mark.parametrize("damage", [flipped, lambda content: content[:-100], lambda content: b""])
def test_a_damaged_shard_is_computed_anew(tmp_path, damage):
    data, teacher = KeyedDataset(Noisy()), make_teacher()
    cache = TeacherCache(tmp_path, teacher, TAPS, data)
    batches = [batch_of(data, numbers) for numbers in ([0, 1], [2, 3])]
    expected = []
    for images, keys in batches:
        expected.append(cache(teacher, images, TAPS, keys))
        cache.flush()
    shard = next(path for path in cache.directory.glob("*.safetensors") if load_file(path)["key"][0, 0] == 2)
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.warns(UserWarning, match=f"{shard.name} is damaged"):
        again = TeacherCache(tmp_path, teacher, TAPS, data)
    assert not shard.exists()
    for (images, keys), want in zip(batches, expected, strict=True):
        got = again(teacher, images, TAPS, keys)
        for one, other in zip([*got[:3], *got.maps], [*want[:3], *want.maps], strict=True):
            assert one is other is None or torch.equal(one, other)
    assert (again.hits, again.misses) == (2, 2)


def test_a_write_that_fails_leaves_the_old_shards(tmp_path, monkeypatch):
    data, teacher = KeyedDataset(Noisy()), make_teacher()
    cache = TeacherCache(tmp_path, teacher, TAPS, data)
    cache(teacher, *[batch_of(data, [0, 1])[0]], TAPS, batch_of(data, [0, 1])[1])
    cache.flush()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    cache(teacher, *[batch_of(data, [2])[0]], TAPS, batch_of(data, [2])[1])
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            cache.flush()
    assert len(list(cache.directory.iterdir())) == 2  # key.json and the first shard
    cache.flush()
    assert len(TeacherCache(tmp_path, teacher, TAPS, data)._rows) == 3


def test_the_key_tells_teachers_taps_and_images_apart(tmp_path, monkeypatch):
    def folder(teacher=None, taps=TAPS, data=None):
        return TeacherCache(tmp_path, teacher or make_teacher(), taps, data or KeyedDataset(Noisy())).directory

    other = Noisy()
    other.transform = "other noise"
    changed = make_teacher()
    changed.model.fc.bias.data[0] += 1e-6
    folders = [
        folder(),
        folder(changed),
        folder(make_teacher(dtype=torch.bfloat16)),
        folder(taps=Taps(logits=True)),
        folder(data=KeyedDataset(other)),
        folder(data=KeyedDataset(Noisy(), seed=1)),
        folder(data=KeyedDataset(Noisy(), description="another folder")),
        TeacherCache(tmp_path, make_teacher(), TAPS, KeyedDataset(Noisy()), context="autocast").directory,
    ]
    with monkeypatch.context() as patch:
        patch.setattr(timm, "__version__", "0.0")
        folders.append(folder())
    softer = make_teacher()
    softer.model.layer1[0].act2 = nn.GELU()
    folders.append(folder(softer))
    assert len(set(folders)) == len(folders)
    assert folder() == folders[0]


@pytest.mark.parametrize("read", [True, False])
def test_the_key_tells_folders_apart(tmp_path, monkeypatch, read):
    """As many images as before are not the same images; those of a large folder count by size and time of change."""
    if not read:
        monkeypatch.setattr(identity, "READ", 0)
    root = write_digits(tmp_path / "data", train=20, validation=1) / "train"

    def told(where=root):
        return KeyedDataset(CheckedImages(create_dataset("", root=str(where)), "train", False, None)).fingerprint

    images, first = sorted(root.rglob("*.png")), told()
    assert told() == first
    held = images[0].rename(tmp_path / "held.png")
    shutil.copy(images[-1], images[0].with_name("other.png"))
    assert told() != first
    images[0].with_name("other.png").unlink()
    held.rename(images[0])
    assert told() == first
    pixels = bytearray(images[3].read_bytes())
    pixels[-1] ^= 1
    images[3].write_bytes(pixels)
    assert told() != first
    pixels[-1] ^= 1
    images[3].write_bytes(pixels)
    assert (told() == first) == read
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    assert (told(tmp_path / "copy") == told()) == read


def test_the_key_tells_arrays_apart():
    class Arrays:
        def __init__(self):
            self.data, self.targets, self.transform = np.zeros((3, 2, 2, 3), np.uint8), [0, 1, 0], None

        def __len__(self):
            return 3

    one, other = Arrays(), Arrays()
    assert KeyedDataset(one).fingerprint == KeyedDataset(other).fingerprint
    other.data[1, 1, 1, 1] = 1
    assert KeyedDataset(one).fingerprint != KeyedDataset(other).fingerprint


def test_an_image_that_is_exchanged_is_taught_anew(teacher, tmp_path):
    """One image removed, one added, through `dtokd train`: the teacher sees all images of the changed folder."""
    data = write_digits(tmp_path / "data")
    options = ["train", *common(data, tmp_path), *distilling(teacher), "--opt", "dtoadamw", "--kd-balance", "dto"]
    cached = ["--kd-cache-teacher", str(tmp_path / "cache"), "--epochs", "1"]
    assert main([*options, *cached, "--experiment", "first"]) == 0
    images = sorted((data / "train").rglob("*.png"))
    images[0].unlink()
    shutil.copy(images[-1], images[1].with_name("zzzz.png"))
    assert main([*options, *cached, "--experiment", "second"]) == 0
    keys = [load_file(path)["key"] for path in (tmp_path / "cache").glob("*/*.safetensors")]
    assert sorted(len(key) for key in keys) == [64, 64]


def test_a_task_with_cache_has_the_losses_of_one_without(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    teacher = timm.create_model("test_resnet", num_classes=5)
    save_file(teacher.state_dict(), tmp_path / "t.safetensors")
    options = parser.parse_args(
        f"--kd-model-name test_resnet --kd-teacher-path {tmp_path}/t.safetensors --kd-distill-type logit multiscale "
        f"--kd-stages 2 --kd-cache-teacher {tmp_path}/cache".split()
    )
    torch.manual_seed(0)
    student = timm.create_model("test_resnet", num_classes=5)
    task = build(options, student, nn.CrossEntropyLoss(), device=torch.device("cpu"), dtype=torch.float32).eval()
    data = KeyedDataset(Noisy())
    images, keys = batch_of(data, range(6))
    target = torch.arange(6) % 5
    plain = task(images, target)
    use_cache(task, options, data)
    task(images, target, keys)
    task.lessons[0][0].model = None  # whoever runs it now fails
    cached = task(images, target, keys)
    assert plain["objectives"].keys() == cached["objectives"].keys()
    assert torch.equal(plain["loss"], cached["loss"])
