"""`dtokd compare --detect`: a comparison whose runs are those of `dtokd detect`."""

import argparse
import io
import json

import pytest
from dtokd.cli import main
from dtokd.compare import options as compare_options
from dtokd.compare import processes
from dtokd.compare.arms import parse_arms
from dtokd.compare.kinds import detects, kind_of
from dtokd.compare.plan import Plan
from dtokd.detect import options as detect_options
from dtokd.errors import UsageError
from dtokd.train.reading import parse
from dtokd.values import parser_of

from .coco import FCOS, VIDT, common
from .test_detect import taught_by_fcos

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teaching(tmp_path_factory):
    return taught_by_fcos(tmp_path_factory.mktemp("teacher"))


def test_a_comparison_of_detectors(coco, teaching, tmp_path, capsys):
    options = ["compare", "--detect", *common(coco, tmp_path), *FCOS, *teaching, "--epochs", "1", "--pictures", "0"]
    options += ["--seeds", "0", "1", "--arms", "fixed:0.5", "whilebetter:0.25,every=2", "--judge-split", "val"]
    options[options.index("--val-split") + 1] = "train"
    assert main([*options, "--dry-run"]) == 0
    assert "6 runs, 6 to train" in " ".join(capsys.readouterr().out.split())
    assert main(options) == 0
    folder = tmp_path / "compare"
    found = json.loads((folder / "compare.json").read_text())
    assert [arm["arm"] for arm in sorted(found["arms"], key=lambda arm: arm["arm"])] == [
        "fixed:0.5",
        "none",
        "whilebetter:0.25,every=2",
    ]
    assert found["setting"] | {"metric": "ap", "images": 4, "judges": "val"} == found["setting"]
    flags = {arm["arm"]: arm["flags"] for arm in found["arms"]}
    # of features and predictions
    assert flags["fixed:0.5"] == "--kd-balance none --task-loss-weight 0.5 --distill-loss-weight 0.25"
    assert (
        "share of feature" in (folder / "compare.md").read_text()
        or "| whilebetter" in (folder / "compare.md").read_text()
    )
    for arm in ("none", "fixed_0.5", "whilebetter_0.25_every=2"):
        assert (folder / arm / "seed-1" / "student-last.safetensors").exists()
    again = (folder / "compare.json").read_text()
    assert main(options) == 0
    assert (folder / "compare.json").read_text() == again


class _Options:
    """The parser of `dtokd compare --detect`."""

    @staticmethod
    def add_arguments(parser):
        compare_options.add_arguments(parser, detect_options)


def test_objectives_are_counted_before_there_is_a_student(coco, teaching, tmp_path):
    def count(*more):
        options = parse(parser_of(_Options), [*common(coco, tmp_path), *more])
        assert detects(options)
        return kind_of(options).objectives(options)

    assert count(*FCOS, *teaching) == 2
    assert count(*FCOS, *teaching, "--kd-distill-type", "feature") == 1
    assert count(*VIDT, "--kd-model-name", "vidt_nano") == 1
    assert count(*FCOS, "--kd-model-name", "test_resnet", "fcos:test_resnet") == 3


def test_directories_and_backbones_count_by_their_contents(coco, teaching, tmp_path):
    """As transformers and timm write them; their names stay."""
    folder, backbone = tmp_path / "detector", tmp_path / "backbone.safetensors"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    backbone.write_bytes(b"1")
    given = [*common(coco, tmp_path), *FCOS, "--kd-model-name", str(folder), "--kd-distill-type", "feature"]
    given += ["--backbone-checkpoint", str(backbone), "--arms", "fixed:0.5"]

    def told():
        return Plan(parse(parser_of(_Options), given)).told()

    before = told()
    assert told() == before
    (folder / "config.json").write_text("{} ")
    changed = told()
    assert changed != before
    backbone.write_bytes(b"2")
    assert told() != changed


def test_a_process_of_its_own_is_a_dtokd_detect(coco, teaching, tmp_path, monkeypatch):
    """What it reads are the options of the run."""
    started = []

    class Process:
        def __init__(self, command, **more):
            self.stdin = io.BytesIO()
            self.stdin.close = lambda: None
            started.append((command, self.stdin))

    monkeypatch.setattr(processes.subprocess, "Popen", Process)
    given = [*common(coco, tmp_path), *FCOS, *teaching, "--arms", "fixed:0.5"]
    run = list(Plan(parse(parser_of(_Options), given)).runs())[1]
    processes._start(run, 2, None)[2].close()
    (command, pipe) = started[0]
    assert command[1:4] == ["-m", "dtokd", "detect"]
    (tmp_path / "options.yaml").write_bytes(pipe.getvalue())
    read = parse(parser_of(detect_options), ["--config", str(tmp_path / "options.yaml")])
    assert {**vars(read), "config": None} == {**vars(run.options), "config": None}
    processes.log_of(run).write_text("a warning\ndtokd detect: error: --lr: too large\n")
    with pytest.raises(UsageError, match=r"fixed:0\.5 with seed 0: --lr: too large"):
        processes._outcome(run, 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--arms dto:temperature=2", "temperature"),
        ("--arms whilebetter:0.1", "0.1 of 8 images are 1"),
        ("--arms dto --judge-split nothing", "has no folder 'nothing'"),
    ],
)
def test_refusals(coco, teaching, tmp_path, capsys, more, message):
    assert main(["compare", "--detect", *common(coco, tmp_path), *FCOS, *teaching, *more.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dtokd compare: error: ")
    assert message in error
    assert not (tmp_path / "compare").exists()


def test_the_options_of_train_are_not_those_of_detectors():
    with pytest.raises(UsageError, match="there are rescale, params, gram, opt, lr, every"):
        parse_arms(["dto:temperature=2"], 1, detects=True)
    parse_arms(["dto:temperature=2"], 1)
    assert not detects(argparse.Namespace())
