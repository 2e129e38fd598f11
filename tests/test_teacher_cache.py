"""Teachers' outputs on disk: the same numbers, no forward pass, and never another teacher's or image's."""

import json
import random
import shutil

import numpy as np
import pytest
import timm
import torch
from dtokd import identity
from dtokd.cli import main
from dtokd.errors import UsageError
from dtokd.objectives import cache as caches
from dtokd.objectives import teacher as teachers
from dtokd.objectives.cache import CachedImages, TeacherCache, TopClasses, TopPlaces, Whole
from dtokd.objectives.detection import Predictions
from dtokd.objectives.logits import soft_kl
from dtokd.objectives.taps import Outputs, Taps
from dtokd.objectives.teacher import Normalisation, Teacher
from dtokd.train import data, options, reading
from dtokd.train.keyed import KeyedDataset, KeyedOrder
from dtokd.values import parser_of
from safetensors.torch import load_file, save_file

from .digits import common, distilling, write_digits, write_teacher
from .test_train_resume import die_and_resume, signal_at, stop_and_resume

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

MIXING = "--mixup 0.8 --cutmix 1 --reprob 0.5 --remode pixel --recount 2 --aa rand-m9-mstd0.5 --smoothing 0.1"
MIXED = MIXING.split()
SIZE = (3, 32, 32)


class Noisy:
    """Six images whose augmentation draws from all three global generators."""

    transform = "noise"

    def __len__(self):
        return 6

    def __getitem__(self, index):
        noise = torch.randn(3, 32, 32) + np.random.standard_normal() + random.random()
        return index + noise, index % 5


def test_an_image_is_a_function_of_sample_and_view():
    images = KeyedDataset(Noisy(), seed=3)
    state = torch.get_rng_state(), random.getstate()
    first, target, key = images[1, 0]
    assert (target, key) == (1, (1, 0))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert torch.equal(images[1, 0][0], first)
    assert not torch.equal(images[2, 0][0] - 1, first)
    assert not torch.equal(images[1, 1][0], first)
    assert not torch.equal(KeyedDataset(Noisy(), seed=4)[1, 0][0], first)


def test_what_a_run_only_tells_is_no_part_of_its_teacher(tmp_path):
    for name in ("student.safetensors", "config.json", "about.json"):
        (tmp_path / name).write_text("{}")
    before = identity.of_path(tmp_path)
    (tmp_path / "about.json").write_text('{"anew": 1}')
    (tmp_path / "classes.json").write_text("{}")
    assert identity.of_path(tmp_path) == before
    (tmp_path / "config.json").write_text('{"num_classes": 3}')
    assert identity.of_path(tmp_path) != before


def shown(order, epoch):
    order.set_epoch(epoch)
    return list(order)


def test_an_epoch_has_the_groups_of_its_view_in_an_order_of_its_own():
    def order(rank=0, size=1):
        return KeyedOrder(23, 4, seed=1, views=2, group=2, unmixed_from=6, rank=rank, size=size)

    def pairs(epoch, *several):
        batches = [batch for each in several for batch in shown(each, epoch)]
        return {(*batch[i : i + 2],) for batch in batches for i in (0, 2)}

    alone = order()
    assert len(alone) == len(shown(alone, 0)) == 5
    assert shown(alone, 0) != shown(alone, 2)
    assert shown(alone, 0) == shown(order(), 0)
    assert pairs(0, alone) == pairs(2, alone)
    assert {s for batch in shown(alone, 4) for s, _ in batch} == set(alone.groups(0).flatten().tolist())
    assert {view for batch in shown(alone, 3) for _, view in batch} == {1}
    assert [alone.view(epoch) for epoch in (5, 6, 7, 8)] == [1, -1, -2, -1]
    ranks = order(0, 2), order(1, 2)
    assert pairs(1, *ranks) <= pairs(1, alone)
    assert len(pairs(1, *ranks)) == 8
    assert KeyedOrder(23, 4, seed=1, views=0).view(17) == 17


def loader(folder, *texts, workers=0):
    given = [*common(folder, folder / "out"), *distilling(folder / "t"), "--kd-cache-teacher", str(folder / "cache")]
    parsed = reading.parse(parser_of(options), [*given, "--kd-cache-views", "2", *texts, "--workers", str(workers)])
    config = {"input_size": SIZE, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    images = data.open_dataset(parsed, "train")
    return data.make_loaders(parsed, images, None, config, 10, torch.device("cpu")).train


def by_key(loaded, epoch):
    loaded.sampler.set_epoch(epoch)
    return {
        tuple(key): (image.clone(), target)
        for images, keyed in loaded
        for image, target, key in zip(images, keyed.target, keyed.keys.tolist(), strict=True)
    }


def same_images(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for k in one for a, b in zip(one[k], other[k], strict=True)
    )


@pytest.mark.parametrize("texts", [[], MIXED, [*MIXED, "--mixup-mode", "elem"]])
def test_the_same_images_whenever_a_view_comes_again(digits, tmp_path, texts):
    """In other batches, in other workers, whatever the global generators are; another view has other images."""
    folder = shutil.copytree(digits, tmp_path, dirs_exist_ok=True)
    loaded = loader(folder, *texts)
    torch.manual_seed(1)
    first, second = by_key(loaded, 0), by_key(loaded, 1)
    torch.manual_seed(2)
    assert len(first) == 64
    assert same_images(first, by_key(loaded, 2))
    assert same_images(second, by_key(loader(folder, *texts, workers=2), 3))
    assert not any(torch.equal(first[sample, 0][0], second[sample, 1][0]) for sample in range(64))
    if texts:
        mixed = torch.stack([target for _, target in first.values()])
        assert ((mixed > 0.02).sum(1) > 1).any()
        torch.testing.assert_close(mixed.sum(1), torch.ones(64))


def test_a_teacher_is_asked_for_the_same_numbers_or_not_at_all(digits, teacher, tmp_path, monkeypatch, capsys):
    """Live, while a cache is written, and from the cache without a teacher: the same bits."""
    views = ["--kd-cache-teacher", str(tmp_path / "cache"), "--kd-cache-views", "2", "--kd-distill-type", "logit"]
    shared = ["train", *common(digits, tmp_path), *distilling(teacher), *views, "feature", *MIXED]
    shared += ["--opt", "dtoadamw", "--kd-balance", "dto", "--drop", "0.2", "--drop-path", "0.1"]

    def student(name, *more):
        assert main([*shared, *more, "--experiment", name]) == 0
        return load_file(tmp_path / name / "student-last.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(TeacherCache, "__call__", lambda self, teacher, images, *_: (teacher(images, self.taps), None))
        live = student("live")
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    written = student("written")
    told = capsys.readouterr().out
    assert "64 images, 2 augmentations, " in told
    assert "0 of 128 rows are there" in told

    def refuse(*args, **keywords):
        raise AssertionError("the teacher was loaded or ran though its outputs are on disk")

    monkeypatch.setattr(teachers, "load", refuse)
    monkeypatch.setattr(Teacher, "__call__", refuse)
    read = student("read", "--workers", "2")
    assert "128 of 128 rows are there; the teacher is not needed" in capsys.readouterr().out
    for other in (written, read):
        assert all(torch.equal(live[key], other[key]) for key in live)
    # reads less than there is; the third epoch is the first one's view
    student("longer", "--kd-distill-type", "logit", "--epochs", "3")


def test_killed_and_stopped_runs_go_on(digits, teacher, tmp_path, monkeypatch):
    """In the middle of the second of three epochs, while the cache is written and where it is read; bit for bit."""
    options = [
        "train",
        *common(digits, tmp_path / "a"),
        *distilling(teacher),
        "--kd-cache-teacher",
        str(tmp_path / "a"),
    ]
    options += ["--kd-cache-views", "2", "--kd-cache-topk", "4", *MIXED, "--mixup-off-epoch", "2", "--opt", "adamw"]
    options += ["--experiment", "x", "--epochs", "3", "--log-interval", "1"]
    assert main(options) == 0
    die_and_resume(options, tmp_path, monkeypatch, 6)
    shutil.rmtree(tmp_path / "b" / "x")
    stop_and_resume(options, tmp_path, monkeypatch, [6])


def test_a_cache_cannot_be_taken_away_in_the_middle_of_an_epoch(digits, teacher, tmp_path, monkeypatch, capsys):
    options = ["train", *common(digits, tmp_path), *distilling(teacher), "--experiment", "x", "--resume", "auto"]
    with monkeypatch.context() as patch:
        signal_at(patch, [2])
        assert main([*options, "--kd-cache-teacher", str(tmp_path / "cache")]) == 143
    assert main(options) == 2
    assert "in the middle of an epoch with --kd-cache-teacher" in capsys.readouterr().err


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with data, a teacher, and a complete cache of one view."""
    folder = tmp_path_factory.mktemp("written")
    write_digits(folder / "data")
    write_teacher(folder / "t.safetensors")
    assert main([*command(folder), "--experiment", "first"]) == 0
    return folder


def command(folder, *more):
    shared = ["train", *common(folder / "data", folder / "out"), *distilling(folder / "t.safetensors")]
    return [*shared, "--kd-cache-teacher", str(folder / "cache"), *more]


def rows_in(folder):
    return folder / "cache" / "seed-42" / "1-test_resnet" / "mixed-0000.rows"


REFUSED = {
    "--hflip was 0.5, is now 0.1": "--hflip 0.1",
    "--reprob was None, is now 0.5": "--reprob 0.5",
    "--mixup was None, is now 0.2": "--mixup 0.2",
    "image input_size was [3, 32, 32], is now [3, 40, 40]": "--img-size 40",
    "autocast was None, is now bfloat16": "--amp --amp-dtype bfloat16",
    "--kd-cache-topk was None, is now 3": "--kd-cache-topk 3",
    "--kd-cache-dtype was float32, is now float16": "--kd-cache-dtype float16",
    "--kd-teacher-img-size was None, is now 64": "--kd-teacher-img-size 64",
    "has logits, this run reads logits and pooled features (head)": "--kd-distill-type logit feature",
    "feature maps and tokens take too much room": "--kd-distill-type multiscale",
    "--aug-repeats: an image would not be": "--aug-repeats 2",
    "--kd-held-out: does not go together": "--kd-balance heldout --opt dtoadamw",
}


@pytest.mark.parametrize("expected", REFUSED)
def test_what_a_cache_cannot_serve_is_refused_before_training(written, capsys, expected):
    assert main([*command(written), "--experiment", "refused", *REFUSED[expected].split()]) == 2
    assert expected in capsys.readouterr().err
    assert not (written / "out" / "refused" / "checkpoints").exists()


@pytest.mark.parametrize("what", ["weights", "data", "timm", "json"])
def test_a_cache_of_something_else_is_refused(written, tmp_path, monkeypatch, capsys, what):
    folder = shutil.copytree(written, tmp_path / "copy")
    expected = what
    if what == "weights":
        state = load_file(folder / "t.safetensors")
        state["fc.bias"][0] += 1e-6
        save_file(state, folder / "t.safetensors")
    elif what == "data":
        images = sorted((folder / "data" / "train").rglob("*.png"))
        images[0].unlink()
        shutil.copy(images[-1], images[1].with_name("zzzz.png"))
        expected = "training data (sha256) was "
    elif what == "timm":
        monkeypatch.setattr(timm, "__version__", "0.0")
        expected = "timm version was "
    else:
        (rows_in(folder).parent / "cache.json").write_text("{")
        expected = "cache.json cannot be read"
    assert main([*command(folder), "--experiment", "refused"]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_other_seeds_have_caches_of_their_own(written, capsys):
    assert main([*command(written), "--experiment", "seven", "--seed", "7", "--epochs", "1"]) == 0
    assert "0 of 64 rows are there" in capsys.readouterr().out
    assert (written / "cache" / "seed-7" / "1-test_resnet" / "mixed-0000.rows").exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "swapped"])
def test_damaged_rows_are_made_again(written, tmp_path, capsys, damage):
    folder = shutil.copytree(written, tmp_path / "copy")
    path = rows_in(folder)
    before = bytearray(path.read_bytes())
    size = len(before) // 64
    after = bytearray(before)
    if damage == "flipped":
        after[3 * size + 13] ^= 64
    elif damage == "swapped":
        after[: 2 * size] = before[size : 2 * size] + before[:size]
    else:
        del after[-10:]
    path.write_bytes(after)
    assert main([*command(folder), "--experiment", "again"]) == 0
    there = {"flipped": 63, "swapped": 62, "cut": 0}[damage]
    assert f"{there} of 64 rows are there" in capsys.readouterr().out
    one, two = (load_file(folder / "out" / name / "student-last.safetensors") for name in ("first", "again"))
    for key in one:
        torch.testing.assert_close(one[key], two[key])
    held = np.frombuffer(path.read_bytes(), np.float32).reshape(64, -1)
    np.testing.assert_allclose(held[:, 2:12], np.frombuffer(before, np.float32).reshape(64, -1)[:, 2:12], rtol=1e-4)


def test_a_row_that_is_lost_while_no_teacher_is_there(written, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(written, tmp_path / "copy")
    reserve = TeacherCache.reserve

    def lose(self, say):
        reserve(self, say)
        self._files[0][1][5] += 1

    monkeypatch.setattr(TeacherCache, "reserve", lose)
    assert main([*command(folder), "--experiment", "lost"]) == 2
    assert "has lost rows since this run began" in capsys.readouterr().err


def test_a_disk_that_is_too_small(digits, teacher, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(caches.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    options = ["train", *common(digits, tmp_path), *distilling(teacher), "--experiment", "x"]
    assert main([*options, "--kd-cache-teacher", str(tmp_path / "cache"), "--kd-cache-views", "0"]) == 2
    told = capsys.readouterr()
    assert "2 augmentations, 48 bytes a row: 6.1 kB; 0 of 128" in told.out
    assert "needs 6.1 kB more, the disk has 1.0 kB" in told.err
    assert not list((tmp_path / "cache").rglob("*.rows"))


def test_a_disk_that_is_full_after_all(digits, teacher, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caches.os, "posix_fallocate", full)
    options = ["train", *common(digits, tmp_path), *distilling(teacher), "--experiment", "x"]
    assert main([*options, "--kd-cache-teacher", str(tmp_path / "cache")]) == 2
    assert "mixed-0000.rows cannot be written: No space left" in capsys.readouterr().err


def test_two_teachers_have_a_cache_each(digits, teacher, tmp_path, capsys):
    options = ["train", *common(digits, tmp_path), *distilling(teacher), "--kd-cache-teacher", str(tmp_path / "cache")]
    twice = [t for text in options for t in ([text] * 2 if text in ("test_resnet", str(teacher)) else [text])]
    model = twice.index("--model")
    del twice[model + 1]
    for name in ("a", "b"):
        assert main([*twice, "--experiment", name, "--epochs", "1"]) == 0
    assert capsys.readouterr().out.count("64 of 64 rows are there; the teacher is not needed") == 2
    assert len(list((tmp_path / "cache" / "seed-42").iterdir())) == 2


# rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_everything_is_kept_as_the_dtype_has_it(dtype):
    logits, pooled = torch.randn(4, 10), torch.randn(4, 7)
    outputs, places = Whole(dtype).decode(Whole(dtype).encode(Outputs(logits=logits, pooled=pooled)))
    assert places is None
    assert torch.equal(outputs.logits, logits.to(dtype).float())
    assert torch.equal(outputs.pooled, pooled.to(dtype).float())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_rest_of_the_probability_is_spread_evenly(temperature):
    """At the objectives' temperature the greatest classes have their probability, the others share what is left."""
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    kept = TopClasses(torch.float32, 6, 40, temperature)
    outputs, _ = kept.decode(kept.encode(Outputs(logits=logits)))
    exact, got = ((x / temperature).double().softmax(-1) for x in (logits, outputs.logits))
    index = logits.topk(6).indices
    torch.testing.assert_close(got.gather(1, index), exact.gather(1, index))
    rest = got.scatter(1, index, torch.nan)
    left = (1 - exact.gather(1, index).sum(1)) / 34
    for row, each in zip(rest, left, strict=True):
        torch.testing.assert_close(row[~row.isnan()], each.expand(34))
    student = torch.randn(5, 40)
    all_but_one = TopClasses(torch.float32, 39, 40, temperature)
    nearly, _ = all_but_one.decode(all_but_one.encode(Outputs(logits=logits)))
    torch.testing.assert_close(soft_kl(student, nearly.logits, temperature), soft_kl(student, logits, temperature))


def test_of_a_detector_the_surest_places_are_kept():
    """The loss is that of all places with weight 0 for the others, also where an image has fewer than k."""
    torch.manual_seed(0)
    objective = Predictions("prediction", dense=True, columns=torch.arange(3))
    theirs, own = (
        Outputs(logits=torch.randn(2, 20, 3), boxes=torch.randn(2, 20, 4), quality=torch.randn(2, 20)) for _ in "ab"
    )
    kept = TopPlaces(torch.float32, 5, objective.sureness)
    found, places = kept.decode(kept.trim(kept.encode(theirs)))
    assert places.shape == (2, 5)
    assert torch.equal(places, objective.sureness(theirs).topk(5).indices.sort().values)
    low = torch.full_like(theirs.logits, -100.0)
    index = places[..., None].expand(-1, -1, 3)
    others = theirs._replace(logits=low.scatter(1, index, theirs.logits.gather(1, index)))
    torch.testing.assert_close(
        objective.loss(own.of_queries(places), None, found, None), objective.loss(own, None, others, None)
    )
    many = TopPlaces(torch.float32, 30, objective.sureness)
    found, places = many.decode(many.trim(many.encode(theirs)))
    assert torch.equal(places, torch.arange(20).expand(2, 20))
    assert all(torch.equal(getattr(found, n), getattr(theirs, n)) for n in ("logits", "boxes", "quality"))


def test_numbers_beyond_float16(tmp_path):
    images = CachedImages(2, {0: torch.arange(2)}, 0, {})
    cache = TeacherCache(tmp_path / "c", images, {})
    model = timm.create_model("test_resnet", num_classes=5)
    model.fc.weight.data *= 1e9
    teacher = Teacher(model, "t", Normalisation())
    cache.keep(Whole(torch.float16), Taps(logits=True), {})
    cache.lay_out(teacher(torch.zeros(1, *SIZE), Taps(logits=True)))
    cache.reserve(print)
    with pytest.raises(UsageError, match="beyond its range; pass bfloat16 or float32"):
        cache(teacher, torch.randn(2, *SIZE), torch.tensor([[0, 0], [1, 0]]), torch.device("cpu"))


def test_a_cache_that_may_only_be_read(written, tmp_path, monkeypatch, capsys):
    """Complete, it is used; it is never written to."""
    folder = shutil.copytree(written, tmp_path / "copy")
    told = json.loads((rows_in(folder).parent / "cache.json").read_text())
    assert told["facts"]["num_classes"] == 10
    monkeypatch.setattr(caches.os, "access", lambda path, mode: False)  # tests may run as root
    before = rows_in(folder).stat().st_mtime_ns
    assert main([*command(folder), "--experiment", "read"]) == 0
    assert rows_in(folder).stat().st_mtime_ns == before
    assert "the teacher is not needed" in capsys.readouterr().out
