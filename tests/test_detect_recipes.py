"""Every recipe for COCO loads, builds its student and teacher, and runs steps on a small set, at reduced sizes."""

import argparse

import pytest
from dtokd import recipes
from dtokd.cli import main
from dtokd.detect import options as detect_options
from dtokd.detect.detectors import deformable
from dtokd.train.reading import read_config
from dtokd.values import parser_of
from safetensors.torch import save_file

from .coco import TINY, common
from .test_detect import vidt
from .written import rows

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [name for name in recipes.names() if name.startswith("coco/")]
DISTILLED = [name for name in NAMES if "teacher" not in name and "none" not in name]
#: One of each kind; the pairs differ in names alone, as `test_the_tables_are_whole` shows.
KINDS = [
    name for name in NAMES if "-" not in name or "vidt_base-vidt_nano" in name or "vidt_small-vidt_tiny/dto" in name
]


def options(name):
    """As `dtokd detect` reads them: each known, each value allowed."""
    parser = parser_of(detect_options)
    return argparse.Namespace(**{**vars(parser.parse_args([])), **read_config(parser, f"recipe:{name}")})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "vidt.safetensors"
    save_file({k: v.clone() for k, v in vidt(7).state_dict().items()}, path)
    return path


def test_the_tables_are_whole():
    """Two teachers, a student alone, and five pairs of three methods and three ablations."""
    assert len(NAMES) == 2 + 1 + 5 * (3 + 3)
    for name in NAMES:
        told = options(name)
        assert told.model in deformable.SIZES
        assert told.experiment == folder_of(name)
        assert (told.epochs, told.lr, told.weight_decay) == (50, 1e-4, 1e-4)
        assert told.batch_size * told.grad_accum_steps == 16
        # only the path of COCO is missing; Swin-nano has no published weights
        assert told.pretrained == (told.model != "vidt_nano")
    for name in DISTILLED:
        told = options(name)
        (teacher,), (path,) = told.kd_model_name, told.kd_teacher_path
        assert name.split("/")[1] == f"{teacher}-{told.model}"
        assert path == f"runs/coco_teacher_{teacher}/student.safetensors"
        assert (told.kd_balance == "dto") == name.endswith(("/dto", "/balance", "/unclipped"))
        assert (told.clip_grad is None) == name.endswith(("projector", "balance", "unclipped"))


@pytest.mark.parametrize("name", KINDS)
def test_recipe_trains(name, coco, teacher, tmp_path):
    """With small detectors in place of the real ones, of which `test_detect.test_sizes` takes a step each."""
    texts = ["--config", f"recipe:{name}", *common(coco, tmp_path), "--grad-accum-steps", "2", "--scales", "40", "48"]
    texts += ["--model", "vidt_nano", "--model-kwargs", *TINY, "--epochs", "1", "--val-split", ""]
    if name in DISTILLED:
        texts += ["--kd-model-name", "vidt_nano", "--kd-model-kwargs", *TINY, "--kd-teacher-path", str(teacher)]
    if options(name).pretrained:
        texts = ["--config", str(without_weights(name, tmp_path)), *texts[2:]]
    assert main(["detect", *texts]) == 0
    (row,) = rows(tmp_path / folder_of(name) / "summary.csv")
    assert ("train_token" in row) == (name in DISTILLED)
    assert ("weight_token" in row) == (options(name).kd_balance == "dto")


def folder_of(name):
    return name.replace("/", "_").replace("-", "_")


def without_weights(name, folder):
    """The recipe, but for the download."""
    file = folder / "changed.yaml"
    file.write_text(f"extends: recipe:{name}\npretrained: false\n")
    return file
