"""Directories and files that others wrote, damaged or full: one sentence each, and nothing that was there is lost."""

import errno
import json
import os
import shutil

import pytest
from dtokd import files
from dtokd.cli import main
from dtokd.detect.detectors import build
from dtokd.detect.detectors.dense import make_backbone
from dtokd.errors import UsageError
from dtokd.recipes import load
from dtokd.texts import parse_json, parse_yaml
from dtokd.train.rundir import RunDir

from .coco import common as coco_options
from .coco import write_coco
from .digits import common, distilling, write_digits
from .refused import refused
from .test_train_resume import signal_at

pytestmark = pytest.mark.usefixtures("one_thread")
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def finished(digits, teacher, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    argv = ["train", *common(digits, output), *distilling(teacher), "--opt", "dtoadamw", "--kd-balance", "dto"]
    assert main([*argv, "--experiment", "x", "--epochs", "1"]) == 0
    return output / "x"


ARGS = {
    "not YAML": ("a: [", "args.yaml cannot be read"),
    "too deep": (DEEP, "args.yaml cannot be read: it is nested too deeply"),
    "no mapping": ("- 1\n", "does not hold the options"),
    "of another program": ("learning_rate: 1\n", "does not hold the options"),
    "a model that is no name": ("model: 5\n", "does not hold the options"),
    "a value of another kind": ("model: test_resnet\nbatch_size: many\n", "batch_size"),
    "a list for a number": ("model: test_resnet\nimg_size: [3]\n", "img_size"),
    "a detector's, in part": ("model: vidt_nano\nannotations: 5\nimg_size: x\n", "img_size"),
}


@pytest.mark.parametrize("command", ["report", "eval"])
@pytest.mark.parametrize("kind", ARGS)
def test_options_of_a_run_that_are_none(finished, tmp_path, capsys, command, kind):
    text, told = ARGS[kind]
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "args.yaml").write_text(text)
    error = refused(capsys, command, run)
    assert told in error
    assert f"dtokd {command}: " in error


NUMBERS = {
    ("summary.csv", "epoch,lr\n0,fast\n"): "summary.csv does not hold the numbers of a run",
    ("summary.csv", "name,age\n1,2\n"): "it has no column 'epoch'",
    ("summary.csv", "epoch,lr\n0," + "9" * 200_000 + "\n"): "field larger than field limit",
    ("steps.csv", "time,loss\n0,1\n"): "it has no column 'step'",
    ("environment.json", DEEP): "environment.json cannot be read: it is nested too deeply",
}


@pytest.mark.parametrize(("name", "text"), NUMBERS)
def test_numbers_of_a_run_that_are_none(finished, tmp_path, capsys, name, text):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / name).write_text(text)
    assert NUMBERS[name, text] in refused(capsys, "report", run)
    (run / name).write_bytes(b"\xff\xfe\x00")
    assert name in refused(capsys, "report", run)


def test_a_comparison_over_a_damaged_run(digits, teacher, tmp_path, capsys):
    argv = ["compare", *common(digits, tmp_path), *distilling(teacher), "--opt", "adamw", "--epochs", "1"]
    argv += ["--arms", "fixed:0.5", "--seeds", "0"]
    assert main(argv) == 0
    capsys.readouterr()
    summary = tmp_path / "compare" / "none" / "seed-0" / "summary.csv"
    summary.write_text("epoch,eval_top1\n0,good\n")
    assert "summary.csv does not hold the numbers of a run" in refused(capsys, *argv)


def full(monkeypatch, part, call="fsync"):
    """The disk is full where the file's name has this part."""
    sync = getattr(os, call)

    def refuse(handle):
        if part in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(files.os, call, refuse)


@pytest.mark.parametrize("part", ["config.json", "args.yaml", "summary.csv", "student-last", "/checkpoints"])
def test_a_full_disk(digits, tmp_path, monkeypatch, capsys, part):
    """Whatever is written: one sentence that names the file; with room again the same command goes on."""
    argv = ["train", *common(digits, tmp_path), "--experiment", "x", "--resume", "auto", "--epochs", "1"]
    with monkeypatch.context() as patch:
        full(patch, part)
        error = refused(capsys, *argv)
    assert error.startswith("dtokd train: error: --output: ")
    assert "cannot be written: No space left on device" in error
    assert part in error
    assert not list(tmp_path.rglob("*.tmp"))
    assert main(argv) == 0


def test_a_log_that_cannot_be_written(digits, teacher, tmp_path, monkeypatch, capsys):
    """In the middle of the training: steps.csv."""
    from dtokd import monitor

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(monitor.CSV, "write", refuse)
    argv = ["train", *common(digits, tmp_path), *distilling(teacher), "--opt", "adamw", "--kd-balance", "dto"]
    assert "--output: " in refused(capsys, *argv)


def test_a_report_that_cannot_be_written(finished, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    with monkeypatch.context() as patch:
        full(patch, "report.html")
        assert "run_dir: " in refused(capsys, "report", run)
    assert main(["report", str(run)]) == 0


def test_other_errors_of_the_system_stay_what_they_are():
    with pytest.raises(ConnectionResetError), files.writing("x", "--output"):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


# ---- a run in the middle of an epoch


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """Of a run of distillation, in its second epoch: the command, and the data."""
    from .digits import write_teacher

    data = write_digits(tmp_path / "data")
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    argv = ["train", *common(data, tmp_path), *distilling(teacher), "--opt", "dtoadamw", "--kd-balance", "dto"]
    argv += ["--experiment", "x"]
    with monkeypatch.context() as patch:
        signal_at(patch, [6])
        assert main(argv) == 143
    return argv, data


def test_data_of_other_contents(stopped, tmp_path, capsys):
    """As many images as before, one of them another; a finished epoch goes on with it."""
    argv, data = stopped
    images = sorted((data / "train").rglob("*.png"))
    held = images[0].read_bytes()
    shutil.copy(images[-1], images[0])
    assert "in the middle of an epoch of other training data" in refused(capsys, *argv, "--resume", "auto")
    first = RunDir(tmp_path / "x").checkpoints()[1]
    copied = shutil.copytree(tmp_path / "x", tmp_path / "copy")
    assert main([*argv, "--resume", str(first), "--output", str(tmp_path / "other")]) == 0
    assert copied.exists()
    images[0].write_bytes(held)
    moved = shutil.copytree(data, tmp_path / "moved")
    assert main([*argv, "--resume", "auto", "--data-dir", str(moved)]) == 0


@pytest.mark.parametrize(
    ("more", "option"),
    [
        (["--kd-balance-gram", "overlap"], "--kd-balance-gram"),
        (["--kd-balance-params", "all"], "--kd-balance-params"),
        (["--kd-balance-rescale", "sum"], "--kd-balance-rescale"),
        (["--kd-temperature", "2"], "--kd-temperature"),
        (["--distill-loss-weight", "0.3"], "--distill-loss-weight"),
        (["--smoothing", "0.2"], "--smoothing"),
        (["--img-size", "40"], "--img-size"),
        (["--class-map", "CLASSES"], "--class-map"),
    ],
)
def test_options_that_stay_in_the_middle_of_an_epoch(stopped, tmp_path, capsys, more, option):
    classes = tmp_path / "classes.txt"
    classes.write_text("".join(f"{i}\n" for i in range(10)))
    argv, _ = stopped
    more = [str(classes) if text == "CLASSES" else text for text in more]
    assert f"in the middle of an epoch with {option} " in refused(capsys, *argv, "--resume", "auto", *more)


def test_annotations_of_other_contents(tmp_path, monkeypatch, capsys):
    data = write_coco(tmp_path / "data")
    argv = ["detect", *coco_options(data, tmp_path), "--model", "fcos:test_resnet", "--model-kwargs", "width=32"]
    with monkeypatch.context() as patch:
        signal_at(patch, [2])
        assert main([*argv, "--experiment", "x"]) == 143
    annotations = next((data / "annotations").glob("*train*.json"))
    text = annotations.read_text()
    content = parse_json(text)
    content["annotations"][0]["bbox"][2] += 1
    annotations.write_text(json.dumps(content))
    error = refused(capsys, *argv, "--experiment", "x", "--resume", "auto")
    assert "in the middle of an epoch of other training data" in error
    annotations.write_text(text)
    assert main([*argv, "--experiment", "x", "--resume", "auto"]) == 0


# ---- texts and values


@pytest.mark.parametrize("text", [DEEP, "{", "", "nul\0"])
def test_no_json(text):
    with pytest.raises(ValueError):  # noqa: PT011  any text
        parse_json(text)


@pytest.mark.parametrize("text", [DEEP, "a: [", "\0", "a: " + "9" * 10_000])
def test_no_yaml(text):
    with pytest.raises(ValueError):  # noqa: PT011  any text
        parse_yaml(text)


@pytest.mark.parametrize("extends", ["5", "[5]", "{a: 1}", "true", "''"])
def test_what_a_recipe_cannot_extend(tmp_path, capsys, extends):
    file = tmp_path / "r.yaml"
    file.write_text(f"extends: {extends}\nlr: 1\n")
    with pytest.raises(ValueError, match="expected recipe:NAME or the name of a file"):
        load(file)
    assert refused(capsys, "train", "-c", file).count("config") == 1


def test_deep_files(digits, teacher, tmp_path, capsys):
    """Of options, of a teacher, of annotations."""
    (tmp_path / "deep.yaml").write_text(f"lr: {DEEP}")
    assert "--config: " in refused(capsys, "train", "-c", tmp_path / "deep.yaml")
    assert "--opt-kwargs" in refused(capsys, "train", *common(digits, tmp_path), "--opt-kwargs", f"a={DEEP}")
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text(DEEP)
    assert "--kd-teacher-path: " in refused(capsys, "train", *common(digits, tmp_path), "--kd-teacher-path", folder)
    data = write_coco(tmp_path / "data")
    next((data / "annotations").glob("*train*.json")).write_text(DEEP)
    assert "--annotations: " in refused(capsys, "detect", *coco_options(data, tmp_path), "--model", "fcos:test_resnet")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0\n\n1\n", "line 2 of"),
        ("0\n1\n0\n", "line 3 of"),
        ("".join(f"{i}\n" for i in range(10)) + "\n", "line 11 of"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_class_maps(digits, tmp_path, capsys, text, told):
    file = tmp_path / "classes.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    error = refused(capsys, "train", *common(digits, tmp_path), "--class-map", file)
    assert "--class-map: " in error
    assert told in error


def test_messages_that_name_what_is_wrong(finished, digits, tmp_path, capsys):
    assert r"holds the character \0" in refused(capsys, "train", *common(digits, tmp_path), "--experiment", "a\0b")
    error = refused(capsys, "train", *common(digits, tmp_path), "--experiment", "y", "--resume", finished)
    assert f"{finished} is a folder; pass a checkpoint, such as {finished}/checkpoints/epoch-0001" in error
    assert "--data-dir: missing" in refused(capsys, "detect", "--device", "cpu", "--model", "fcos:test_resnet")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("width", value) for value in (0, -32, 33, "x", True, 2**40)],
        *[("score_thresh", "x"), ("score_thresh", float("nan")), ("nms_thresh", 2), ("depth", 3)],
    ],
)
def test_arguments_of_a_detector(key, value):
    with pytest.raises(UsageError, match="--model-kwargs"):
        build._make("fcos:test_resnet", 3, {key: value}, "--model")
    assert make_backbone("test_resnet", {}, None) is not None
