"""What `dtokd train` finds in the data, what it passes over, and what it stores with the student."""

import argparse
import json
import shutil
import tarfile

import numpy as np
import pytest
import timm
import torch
import yaml
from dtokd.cli import main
from dtokd.predict import _classifier_transform
from dtokd.train import options as train_options
from dtokd.train import reading
from dtokd.train.data import open_dataset, validation_loader
from dtokd.train.found import FORMATS
from dtokd.trained import Trained
from dtokd.values import parser_of
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

from .digits import common, distilling, write_digits
from .refused import refused

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "data")


def run(data, output, *more):
    assert main(["train", *common(data, output), "--epochs", "1", "--experiment", "x", *map(str, more)]) == 0
    return output / "x"


def fails(capsys, data, output, *more):
    error = refused(capsys, "train", *common(data, output), "--experiment", "x", *more)
    assert not (output / "x").exists()
    return error


def test_what_was_found_is_told(capsys, data, tmp_path):
    (data / "train" / "3" / "notes.txt").write_text("")
    (data / "train" / "README").write_text("")
    run(data, tmp_path)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == (
        "train: 64 images of 10 classes (0, 1, 2, 3, 4, ... (10)); passed over: 1 .txt, 1 files without an extension"
    )
    assert told[1] == "validation: 30 images of 10 classes (0, 1, 2, 3, 4, ... (10))"


def test_formats(capsys, data, tmp_path):
    """Each class in another format: all are read, and give what PNG gives."""
    plain = run(data, tmp_path / "plain")
    for split in ("train", "validation"):
        for folder, extension in zip(sorted((data / split).iterdir()), (".bmp", ".gif", ".ppm", ".tiff"), strict=False):
            for file in folder.iterdir():
                Image.open(file).save(file.with_suffix(extension))
                file.unlink()
    capsys.readouterr()
    other = run(data, tmp_path / "other")
    assert "train: 64 images of 10 classes" in capsys.readouterr().out
    a, b = (load_file(path / "student-last.safetensors") for path in (plain, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("extension", FORMATS)
def test_pillow_reads(extension, tmp_path):
    pixels = np.full((4, 4, 3), 200, np.uint8)
    image = Image.fromarray(pixels)
    kind = {".apng": "PNG", ".jfif": "JPEG", ".pnm": "PPM"}.get(extension)
    (image.convert("1") if extension == ".pbm" else image).save(tmp_path / f"x{extension}", kind)
    assert np.asarray(Image.open(tmp_path / f"x{extension}").convert("RGB")).shape == (4, 4, 3)


def test_images_without_a_class_folder(capsys, data, tmp_path):
    stray = next((data / "train" / "3").iterdir())
    shutil.copy(stray, data / "train" / "stray.png")
    assert "outside of any class folder, such as 'stray.png'" in fails(capsys, data, tmp_path)
    for folder in ("train", "validation"):
        for file in list((data / folder).glob("*/*.png")):
            file.rename(data / folder / file.name)
        for empty in (data / folder).iterdir():
            if empty.is_dir():
                empty.rmdir()
    assert "65 images lie in" in fails(capsys, data, tmp_path)


@pytest.mark.parametrize(("kept", "held"), [([], "nothing"), (["a.heic", "b.heic"], "2 .heic")])
def test_class_without_an_image(capsys, data, tmp_path, kept, held):
    for split in ("train", "validation"):
        (data / split / "ten").mkdir()
        for name in kept:
            (data / split / "ten" / name).write_text("")
    error = fails(capsys, data, tmp_path)
    assert "would be a class, but has no image of a known format" in error
    assert f"({held})" in error


def test_folders_in_folders(capsys, data, tmp_path):
    """The innermost name is the class; an empty one inside is none."""
    for split in ("train", "validation"):
        (data / split / "3" / "deeper").mkdir()
        (data / split / "group").mkdir()
        (data / split / "4").rename(data / split / "group" / "4")
    run(data, tmp_path)
    told = capsys.readouterr().out.splitlines()[0]
    assert told.startswith("train: 64 images of 10 classes")
    assert "folders lie in folders" in told


def test_hidden_folder(capsys, data, tmp_path):
    shutil.copytree(data / "train" / "3", data / "train" / ".ipynb_checkpoints")
    assert "hidden folder" in fails(capsys, data, tmp_path)


def test_class_map(capsys, data, tmp_path):
    """Of nine of the ten: the tenth is passed over, and that is told. One that has no images is refused."""
    classes = tmp_path / "classes.txt"
    classes.write_text("".join(f"{i}\n" for i in range(9)))
    run(data, tmp_path, "--class-map", classes)
    assert ".png of classes that --class-map does not name" in capsys.readouterr().out
    classes.write_text("".join(f"{i}\n" for i in range(11)))
    assert "'train' has no image of 10" in fails(capsys, data, tmp_path / "b", "--class-map", classes)
    theirs = ["--dataset", "torch/image_folder", "--class-map", classes]
    assert "--class-map: --dataset torch/image_folder" in fails(capsys, data, tmp_path / "b", *theirs)


@pytest.mark.parametrize("extension", ["png", "tiff"])
@pytest.mark.parametrize("more", [[], ["--dataset", "torch/image_folder"]])
def test_sixteen_bits(capsys, data, tmp_path, extension, more):
    """Pillow would make almost all of it white."""
    folder = data / "train" / "3"
    deep = (np.arange(32 * 32, dtype=np.uint16) * 64).reshape(32, 32)
    Image.fromarray(deep).save(folder / f"deep.{extension}")
    assert main(["train", *common(data, tmp_path), *more, "--on-bad-image", "error"]) == 2
    error = capsys.readouterr().err
    assert f"deep.{extension}" in error
    assert "more than 8 bits per value" in error


@pytest.mark.parametrize("text", ["in_chans=1", "num_classes=20"])
def test_arguments_that_the_data_depends_on(capsys, digits, tmp_path, text):
    """The student alone would have them: images of three channels, names of ten classes."""
    told = fails(capsys, digits, tmp_path, "--model-kwargs", text)
    assert f"pass --{text.partition('=')[0].replace('_', '-')} instead" in told


def test_channels_of_torchvisions_folders(data, tmp_path):
    """Grey images for a student of one channel, as in folders that timm reads."""
    run(data, tmp_path, "--dataset", "torch/image_folder", "--in-chans", "1", "--dry-run")


def test_wide_images_are_judged_as_the_model_was_trained(tmp_path):
    """Some are squashed, not cropped: by the evaluation, by `dtokd predict`, and by who reads the model card."""
    folder = tmp_path / "validation" / "0"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 255, (40, 90, 3), dtype=np.uint8))
    image.save(folder / "0.png")
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    config |= {"crop_pct": 1.0, "crop_mode": "squash"}
    options = reading.parse(parser_of(train_options), common(tmp_path, tmp_path))
    images = open_dataset(options, "validation")
    ((shown, _),) = validation_loader(options, images, config, torch.device("cpu"))
    expected = create_transform(**config)(image)
    torch.testing.assert_close(shown[0], expected, rtol=0, atol=1e-5)
    model = argparse.Namespace(pretrained_cfg=config)
    predicts = _classifier_transform(Trained(tmp_path, options, {}, tmp_path, model))
    assert torch.equal(predicts(image), expected)


def test_tar(capsys, digits, tmp_path):
    """Its classes are counted; it has no splits."""
    with tarfile.open(tmp_path / "train.tar", "w") as file:
        file.add(digits / "train", arcname=".")
    tar = tmp_path / "train.tar"
    assert "would be the same images" in fails(capsys, tar, tmp_path / "out")
    path = run(tar, tmp_path / "out", "--val-split", "")
    assert "train: 64 images of 10 classes" in capsys.readouterr().out
    assert json.loads((path / "config.json").read_text())["num_classes"] == 10


def test_classes_that_nobody_tells(capsys, digits, tmp_path, monkeypatch):
    """A web data set without --num-classes would have got the model's 1000."""
    from dtokd.train import data

    monkeypatch.setattr(data, "class_names", lambda images: None)
    assert "--num-classes: missing" in fails(capsys, digits, tmp_path)


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("test_vit", ["--img-size", "64", "--model-kwargs", "depth=2", "--mean", "0.1", "--std", "0.2"]),
        ("cifar_resnet20", ["--mean", "0.1", "0.2", "0.3"]),
        ("test_resnet", ["--in-chans", "1", "--crop-pct", "0.5", "--interpolation", "bilinear"]),
    ],
)
def test_student_elsewhere(digits, tmp_path, model, more):
    """`config.json` has what timm needs: the same student, its classes and its preprocessing."""
    path = run(digits, tmp_path, "--model", model, *more)
    student = timm.create_model(f"local-dir:{path}", checkpoint_path=str(path / "student.safetensors"))
    held = load_file(path / "student.safetensors")
    assert all(torch.equal(value, held[name]) for name, value in student.state_dict().items())
    assert student.pretrained_cfg["label_names"] == [str(i) for i in range(10)]
    config = resolve_data_config(model=student)
    size = 64 if model == "test_vit" else 32
    channels = 1 if "--in-chans" in more else 3
    assert tuple(config["input_size"]) == (channels, size, size)
    if "--mean" in more:
        assert config["mean"][0] == 0.1
    if "--crop-pct" in more:
        assert (config["crop_pct"], config["interpolation"]) == (0.5, "bilinear")


def test_eval_of_other_classes(capsys, data, tmp_path):
    path = run(data, tmp_path)
    (data / "validation" / "9").rename(data / "validation" / "nine")
    assert main(["eval", str(path), "--device", "cpu"]) == 2
    assert "labels would not mean the same" in capsys.readouterr().err


def teacher_run(data, output):
    """A teacher of another size, width, depth and normalisation, which no name of timm's stands for."""
    more = ["--model", "test_vit", "--img-size", "64", "--mean", "0.3", "--std", "0.4"]
    return run(data, output, *more, "--model-kwargs", "depth=2", "embed_dim=48", "num_heads=3")


@pytest.mark.parametrize("distill_type", ["logit", "feature"])
def test_teacher_of_a_run(digits, tmp_path, distill_type):
    """The directory alone brings all of it: the teacher sees what it saw when it was trained."""
    from dtokd.objectives.teacher import Normalisation, Teacher, choose_size, load

    path = teacher_run(digits, tmp_path / "teacher")
    balanced = ["--kd-distill-type", distill_type, "--kd-balance", "dto", "--opt", "dtoadamw"]
    student = run(digits, tmp_path / "student", "--kd-teacher-path", path, *balanced)
    assert yaml.safe_load((student / "args.yaml").read_text())["kd_model_name"] == ["test_vit"]

    model = load("test_vit", str(path), in_chans=3, device=torch.device("cpu"), dtype=torch.float32)
    held = load_file(path / "student.safetensors")
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    assert choose_size(model, None, trained=True) == (64, 64)
    teacher = Teacher(model, "t", Normalisation((0.5,) * 3, (0.5,) * 3), size=(64, 64))
    view = teacher.view(torch.zeros(1, 3, 32, 32))  # a pixel of 0.5
    torch.testing.assert_close(view, torch.full((1, 3, 64, 64), 0.2 / 0.4))


def test_teachers_arguments(capsys, digits, tmp_path):
    """--kd-model-kwargs with a file of weights, as `detect` has it."""
    weights = teacher_run(digits, tmp_path / "teacher") / "student.safetensors"
    given = ["--kd-model-name", "test_vit", "--kd-teacher-path", weights]
    assert "does not hold weights" in fails(capsys, digits, tmp_path / "b", *given)
    arguments = ["img_size=64", "depth=2", "embed_dim=48", "num_heads=3"]
    run(digits, tmp_path / "c", *given, "--kd-model-kwargs", *arguments)
    nonsense = fails(capsys, digits, tmp_path / "d", *given, "--kd-model-kwargs", "foo=1")
    assert "--kd-model-kwargs {'foo': 1}" in nonsense


def test_teacher_runs_that_do_not_fit(capsys, data, teacher, tmp_path):
    path = teacher_run(data, tmp_path / "teacher")
    other = ["--kd-model-name", "test_resnet", "--kd-teacher-path", path]
    assert "is a run of test_vit" in fails(capsys, data, tmp_path / "a", *other)
    assert "is no run directory" in fails(capsys, data, tmp_path / "b", "--kd-teacher-path", data)
    names = write_digits(tmp_path / "others")
    for split in ("train", "validation"):
        for i in range(10):
            (names / split / str(i)).rename(names / split / f"c{i}")
    assert "class 0 is 'c0' in the data, but '0' for the teacher" in fails(
        capsys, names, tmp_path / "c", "--kd-teacher-path", path
    )
    run(names, tmp_path / "d", *distilling(teacher))  # a file names no classes
