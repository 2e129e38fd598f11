"""`dtokd train --kd-balance heldout`: images that are never trained on set the weights."""

import shutil
from pathlib import Path

import pytest
import torch
from dtokd.cli import main
from dtokd.errors import UsageError
from dtokd.train import data, heldout
from dtokd.train import options as train_options
from dtokd.train.reading import parse
from dtokd.values import parser_of
from PIL import Image
from torch import nn

from dtokd_kernels.weighting import HeldOut

from .digits import common, distilling
from .written import rows

pytestmark = pytest.mark.usefixtures("one_thread")
HELD = ["--kd-balance", "heldout", "--kd-held-out", "0.25", "--kd-held-out-every", "2"]


@pytest.mark.parametrize(
    "more",
    [
        "--opt dtoadamw",
        "--opt adamw --kd-distill-type feature --mixup 0.2",
        "--opt dtosgd --grad-accum-steps 2 --amp --amp-dtype float16",
    ],
    ids=["fused", "filled", "accumulated"],
)
def test_weights_change_at_the_measurements_alone(digits, teacher, tmp_path, monkeypatch, more):
    seen, observe = [], HeldOut.observe

    def watched(self, gram, names):
        observe(self, gram, names)
        seen.append((gram.isfinite().all(), names, float(self.state_dict()["weights"][1])))

    monkeypatch.setattr(HeldOut, "observe", watched)
    options = [*common(digits, tmp_path), *distilling(teacher), *HELD, *more.split(), "-b", "8", "--epochs", "2"]
    assert main(["train", *options, "--experiment", "x", "--log-interval", "1"]) == 0
    steps = rows(tmp_path / "x" / "steps.csv")
    (name,) = (key.removeprefix("weight_") for key in steps[0] if key.startswith("weight_") and key != "weight_task")
    weights = [float(row[f"weight_{name}"]) for row in steps]
    assert len(weights) >= 6
    assert all(finite and names == ("task", name) for finite, names, _ in seen)
    expected = [weight for _, _, weight in seen for _ in range(2)]  # each until the next one
    assert weights == pytest.approx(expected[: len(weights)], rel=1e-6)
    assert len(seen) == -(-len(weights) // 2)


def test_auto_chooses_and_goes_on(digits, teacher, tmp_path, capsys):
    options = [*common(digits, tmp_path), *distilling(teacher), *HELD, "--opt", "dtoadamw", "-b", "8"]
    options += ["--kd-balance", "auto", "--kd-balance-kwargs", "window=4", "--log-interval", "1", "--experiment", "x"]
    assert main(["train", *options]) == 0
    assert "for which the held-out loss falls fastest" in " ".join(capsys.readouterr().out.split())
    weights = [row["weight_kl"] for row in rows(tmp_path / "x" / "steps.csv")]
    assert len(weights) == 12
    assert len(set(weights[6:])) == 1
    assert len(set(weights)) > 1


def test_a_window_longer_than_the_run_is_refused(digits, teacher, tmp_path, capsys):
    """Equal shares would be trained to the end, and nothing chosen; a window that just fits is none of these."""
    options = [*common(digits, tmp_path), *distilling(teacher), *HELD, "--opt", "dtoadamw", "-b", "8"]
    options += ["--kd-balance", "auto", "--experiment", "x"]
    for window, measurements in ((), 6), (("--kd-balance-kwargs", "window=7"), 6):
        assert main(["train", *options, *window]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert f"12 steps have {measurements}" in told
        assert f"N from 2 to {measurements}" in told
        assert not (tmp_path / "x" / "summary.csv").exists()
    assert main(["train", *options, "--kd-balance-kwargs", "window=6"]) == 0
    assert "for which the held-out loss falls fastest" in " ".join(capsys.readouterr().out.split())


def test_the_last_image_of_a_class_is_trained_on():
    everyone = heldout.positions(0.5, 40)
    assert heldout.positions(0.5, 40, [(0,)] * 40) == everyone
    rare = everyone[1][3:5]  # the only two of their class, and both would be held out
    trained, held = heldout.positions(0.5, 40, [(1 if i in rare else 0,) for i in range(40)])
    assert rare[0] in held
    assert rare[1] in trained
    assert len(held) == 20
    with pytest.raises(UsageError, match="of 4 images are 0 that are not the last of a class"):
        heldout.positions(0.5, 4, [(i,) for i in range(4)])


def test_a_training_image_stands_in_for_one_that_cannot_be_read(digits, tmp_path):
    """And a held-out one for a held-out one: the next in the folder may be of the other part."""
    root = shutil.copytree(digits, tmp_path / "data")
    options = parse(parser_of(train_options), [*common(root, tmp_path), *distilling(tmp_path), *HELD])
    images = data.open_dataset(options, "train")
    for part in heldout.split(options, images):
        place = next(i for i, at in enumerate(part.positions) if (at + 1) % 64 not in part.positions)
        damaged = Path(images_of(part)[place])
        kept = damaged.read_bytes()
        damaged.write_bytes(b"none")
        expected = images_of(part)[(place + 1) % len(part)]
        with Image.open(expected) as image:
            assert part[place][0].tobytes() == image.convert("RGB").tobytes()
        damaged.write_bytes(kept)


def test_a_last_batch_of_one_is_left_out(digits, teacher, tmp_path, monkeypatch):
    """The student's last maps have one pixel, so that batch normalization would have one value."""
    seen, errors = [], heldout.Classifiers.errors
    monkeypatch.setattr(
        heldout.Classifiers,
        "errors",
        lambda self, images, target: seen.append(len(target)) or errors(self, images, target),
    )
    options = [*common(digits, tmp_path), *distilling(teacher), "--kd-balance", "whilebetter", "--opt", "adamw"]
    options += ["--kd-held-out", str(17 / 64), "--kd-held-out-every", "1", "-b", "8", "--epochs", "1"]
    assert main(["train", *options]) == 0
    assert seen == [8, 8, 8, 8, 8]


def images_of(part):
    return [part.images.reader.samples[i][0] for i in part.positions]


def test_held_out_images_are_never_trained_on_and_have_a_transform_of_their_own(digits, tmp_path):
    options = parse(parser_of(train_options), [*common(digits, tmp_path), *distilling(tmp_path), *HELD])
    images = data.open_dataset(options, "train")
    first, second = heldout.split(options, images), heldout.split(options, data.open_dataset(options, "train"))
    train, held = first
    assert heldout.labels_of(images) == [(label,) for _, label in images.images.reader.samples]
    assert len(train) == 48
    assert len(held) == 16
    assert set(images_of(train)) | set(images_of(held)) == {path for path, _ in images.images.reader.samples}
    assert images_of(held) == images_of(second[1])  # the same in each run
    train.transform, held.transform = (lambda image: "trained"), (lambda image: "held out")
    assert train[0][0] == "trained"
    assert held[0][0] == "held out"
    assert images.transform is None


def test_statistics_stay():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(8, 3) + 4
    with heldout.frozen_statistics(model):
        out = model(x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert out.mean().abs() < 1e-5  # of the batch
    assert [m.track_running_stats for m in model] == [True, False]


def test_a_resumed_run_takes_the_batch_of_its_step():
    class Loader(list):
        pass

    loader = Loader(range(3))

    def taken(numbers):
        images = object.__new__(heldout.HeldOutImages)
        images._loader, images._batches, images._next = loader, iter(()), -1
        return [images._batch(number) for number in numbers]

    assert taken(range(8)) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert taken([4, 5, 6]) == [1, 2, 0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--kd-balance heldout --kd-held-out 0", "pass a --kd-held-out above 0"),
        ("--kd-balance dto --kd-held-out 0.1", "does not look at held-out images"),
        ("--kd-held-out 0.1", "does not look at held-out images"),
        ("--kd-balance heldout --kd-held-out 0.01", "hold out two at least"),
        ("--kd-balance heldout --kd-held-out 0.7", "--kd-held-out"),
        ("--kd-balance heldout --kd-held-out 0.1 --kd-held-out-every 0", "--kd-held-out-every"),
    ],
)
def test_refusals(digits, teacher, tmp_path, capsys, more, message):
    options = [*common(digits, tmp_path), *distilling(teacher), "--opt", "adamw", "--experiment", "x", *more.split()]
    try:
        code = main(["train", *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x" / "args.yaml").exists()
