"""Runs of `dtokd detect`: resumed, stopped, with every kind of teacher; what does not fit is refused."""

import json

import pytest
import torch
import transformers
from dtokd.cli import main
from dtokd.detect import build
from dtokd.objectives.cache import TeacherCache
from dtokd.objectives.teacher import Teacher
from dtokd.train.checkpoint import load_checkpoint
from dtokd.train.rundir import RunDir
from safetensors.torch import load_file, save_file

from .coco import CATEGORIES, TINY, VIDT, common, edited
from .coco import FCOS as FCOS_OPTIONS
from .refused import refused
from .test_detect import configuration, dense, vidt
from .test_train_resume import die_and_resume, stop_and_resume
from .written import rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def vidt_teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "vidt.safetensors"
    save_file({k: v.clone() for k, v in vidt(7).state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def fcos_teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "fcos.safetensors"
    save_file(dense(seed=7).state_dict(), path)
    return path


def distilling(kind, path):
    name, kwargs = ("vidt_nano", TINY) if kind == "vidt" else ("fcos:test_resnet", ["width=32"])
    options = VIDT if kind == "vidt" else FCOS_OPTIONS
    return [*options, "--kd-model-name", name, "--kd-model-kwargs", *kwargs, "--kd-teacher-path", str(path)]


VARIANTS = {
    "fcos": "--opt dtoadamw --kd-balance dto --clip-grad 1 --model-ema --crop --color-jitter 0.3",
    "vidt": "--opt adamw --kd-balance amortized --kd-feature-norm standardize --kd-feature-loss smooth_l1 --workers 1",
}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", VARIANTS)
def test_resumed_run_is_the_undisturbed_one(coco, tmp_path, monkeypatch, request, kind):
    """Killed in the second epoch, at its second step; bit for bit. Pictures and figures are in the report."""
    teacher = request.getfixturevalue(f"{kind}_teacher")
    options = ["detect", *common(coco, tmp_path / "a"), *distilling(kind, teacher), *VARIANTS[kind].split()]
    options += ["--experiment", "x", "--log-interval", "1", "--pictures", "2"]
    assert main(options) == 0
    die_and_resume(options, tmp_path, monkeypatch, 6)
    told = rows(tmp_path / "a" / "x" / "summary.csv")[-1]
    names = ["feature", "prediction"] if kind == "fcos" else ["token"]
    assert sum(float(told[f"weight_{name}"]) for name in ["task", *names]) == pytest.approx(1)
    assert all(float(told[f"train_{name}"]) > 0 for name in names)
    page = (tmp_path / "a" / "x" / "report.html").read_text()
    assert page.count("<img") == 2
    assert "average precision" in page
    assert "Fig. 4" in page
    state = load_checkpoint(tmp_path / "a" / "x" / "checkpoints" / "epoch-0002.safetensors")
    assert not any("teacher" in name for name in state["weights"])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("kind", "stops"), [("fcos", [2, 3, 6]), ("vidt", [1, 6])])
def test_stopped_run_goes_on_in_the_middle_of_an_epoch(coco, tmp_path, monkeypatch, request, kind, stops):
    """By SIGTERM in these iterations; bit for bit."""
    teacher = request.getfixturevalue(f"{kind}_teacher")
    options = ["detect", *common(coco, tmp_path / "a"), *distilling(kind, teacher), *VARIANTS[kind].split()]
    options += ["--experiment", "x"]
    assert main(options) == 0
    stop_and_resume(options, tmp_path, monkeypatch, stops)


@pytest.mark.parametrize(
    "texts",
    [
        "--kd-distill-type token prediction --kd-balance dto --opt dtoadamw --kd-projector orthogonal",
        "--kd-distill-type token feature --kd-match index --kd-feature-loss norm --kd-token-root "
        "--distill-loss-weight 4 4",
        "--kd-share-queries --kd-feature-norm standardize --kd-balance dto --opt dtosgd --lr 1e-4",
        "--amp --amp-dtype bfloat16 --kd-balance dto --opt dtoadamw --grad-accum-steps 2",
    ],
)
def test_vidt_variants(coco, tmp_path, vidt_teacher, texts):
    options = [*common(coco, tmp_path), *distilling("vidt", vidt_teacher), *texts.split()]
    assert main(["detect", *options, "--experiment", "x", "--epochs", "1", "--pictures", "0"]) == 0
    (row,) = rows(tmp_path / "x" / "summary.csv")
    assert float(row["train_loss"]) > 0
    assert 0 <= float(row["eval_ap"]) <= 1


def test_directory_teaches_and_student_loads(coco, tmp_path, capsys):
    """A softmax detector of transformers with a class of its own teaches; the student is judged, and starts a run."""
    config = configuration("detr")
    config.id2label = {0: "ninety", 1: "N/A", 2: "seven", 3: "three"}
    torch.manual_seed(0)
    transformers.AutoModelForObjectDetection.from_config(config).save_pretrained(tmp_path / "detr")
    options = [*common(coco, tmp_path), *VIDT, "--epochs", "1", "--pictures", "0"]
    teaching = ["--kd-model-name", str(tmp_path / "detr"), "--kd-distill-type", "token", "prediction"]
    assert main(["detect", *options, *teaching, "--experiment", "x"]) == 0
    (row,) = rows(tmp_path / "x" / "summary.csv")
    assert float(row["train_prediction"]) > 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "x")]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert judged["images"] == 4
    assert {key: judged[key] for key in ("ap", "ap50")} == {key: float(row[f"eval_{key}"]) for key in ("ap", "ap50")}
    assert main(["eval", str(tmp_path / "x"), "--batch-size", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(judged, nan_ok=True)
    assert main(["eval", str(tmp_path / "x"), "--checkpoint", str(tmp_path / "absent")]) == 2
    assert "--checkpoint: there is no file" in capsys.readouterr().err
    start = ["--initial-checkpoint", str(tmp_path / "x" / "student.safetensors")]
    assert main(["detect", *options, *start, "--experiment", "y", "--lr", "0"]) == 0
    first, second = (load_file(tmp_path / name / "student.safetensors") for name in "xy")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_metric_that_is_nan_in_all_epochs(coco, tmp_path, capsys):
    """There is no large object: the student is the last epoch's, and the report says why."""
    options = [*common(coco, tmp_path), *FCOS_OPTIONS, "--pictures", "0", "--eval-metric", "ap_large"]
    assert main(["detect", *options, "--experiment", "x"]) == 0
    told = capsys.readouterr().out
    assert "--eval-metric ap_large: instances_val.json has no object of this size" in told
    assert "ap_large is nan in all epochs" in told
    best, last = (load_file(tmp_path / "x" / f"student{name}.safetensors") for name in ("", "-last"))
    assert all(torch.equal(best[name], last[name]) for name in best)
    assert "ap_large is nan in all of them" in (tmp_path / "x" / "report.html").read_text()
    assert main(["detect", *options, "--experiment", "x", "--resume", "auto", "--epochs", "3"]) == 0
    assert load_checkpoint(tmp_path / "x" / "checkpoints" / "epoch-0003.safetensors")["best"]["epoch"] == 2


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("--kd-model-name fcos:test_resnet --kd-model-kwargs width=64", "does not hold weights of fcos:test_resnet"),
        ("--kd-model-name vidt_nano --kd-teacher-path {vidt}", "are of two kinds"),
        ("--kd-model-name fcos:test_resnet --kd-distill-type token", "has no detection tokens"),
        (
            "--kd-model-name fcos:test_resnet --kd-teacher-dtype bfloat16 --kd-teacher-img-size 64",
            "--kd-teacher-img-size, --kd-teacher-dtype: for timm's models as teachers, but fcos:test_resnet is",
        ),
        ("--kd-model-name fcos:test_resnet --kd-share-queries", "--kd-share-queries: student and teacher need"),
        ("--kd-model-name fcos:test_resnet --distill-loss-weight 1 2 3", "--distill-loss-weight: got 3"),
        ("--kd-model-name fcos:test_resnet --kd-teacher-path absent", "--kd-teacher-path: there is no file absent"),
    ],
)
def test_bad_teachers(coco, tmp_path, capsys, fcos_teacher, vidt_teacher, texts, message):
    options = [*common(coco, tmp_path / "runs"), *FCOS_OPTIONS]
    options += ["--kd-model-kwargs", "width=32", "--kd-teacher-path", str(fcos_teacher)]
    more = texts.format(vidt=vidt_teacher).split()
    more += ["--kd-model-kwargs", *TINY] if "vidt" in texts else []
    assert main(["detect", *options, *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_queries_by_index_must_be_as_many(coco, tmp_path, capsys, vidt_teacher):
    options = [*common(coco, tmp_path), *distilling("vidt", vidt_teacher), "--kd-match", "index"]
    i = options.index("num_queries=10")
    options[i] = "num_queries=11"
    assert main(["detect", *options]) == 2
    assert "the student has 11 queries, the teacher 10" in capsys.readouterr().err


def test_a_run_of_its_own(coco, tmp_path, capsys):
    """A second process is refused, and so is a checkpoint of another model, which changes nothing."""
    options = [*common(coco, tmp_path), *FCOS_OPTIONS, "--epochs", "1", "--pictures", "0", "--experiment", "x"]
    with RunDir(tmp_path / "x").locked():
        assert main(["detect", *options]) == 2
    assert "x is in use by another run of this process" in capsys.readouterr().err
    assert main(["detect", *options]) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()}
    resume = ["--resume", str(tmp_path / "x" / "checkpoints" / "epoch-0001.safetensors")]
    other = [text.replace("width=32", "width=64") for text in options]
    assert main(["detect", *other, *resume]) == 2
    assert "is of another model" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()} == files


def test_run_names_its_classes(coco, tmp_path, capsys):
    """In the order of the labels, with their categories and the preprocessing; other data is not judged by them."""
    options = [*common(coco, tmp_path), *FCOS_OPTIONS, "--experiment", "x", "--epochs", "1", "--pictures", "0"]
    assert main(["detect", *options]) == 0
    card = json.loads((tmp_path / "x" / "config.json").read_text())
    ids = sorted(CATEGORIES)
    assert (card["label_names"], card["category_ids"]) == ([CATEGORIES[i] for i in ids], ids)
    assert (card["architecture"], card["num_classes"]) == ("fcos:test_resnet", len(ids))
    assert card["input"]["img_size"] == 48
    assert len(card["input"]["mean"]) == 3

    def exchange(content):
        one, two = content["categories"][:2]
        one["name"], two["name"] = two["name"], one["name"]

    other = edited(coco, tmp_path / "other", "val", exchange)
    capsys.readouterr()
    assert "labels would not mean the same" in refused(capsys, "eval", tmp_path / "x", "--data-dir", other)
    told = refused(capsys, "eval", tmp_path / "x", "--crop-pct", 0.5, "--num-classes", 3, "--img-size", 48)
    assert "--num-classes, --crop-pct: for classifiers, but" in told


CACHED = {
    "dense": "fcos --square",
    "surest places, padded batches": "fcos --kd-cache-topk 30 --crop --color-jitter 0.3",
    "queries": "vidt --kd-balance dto --opt dtoadamw",
    "surest queries": "vidt --kd-cache-topk 4 --workers 2",
}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("case", CACHED)
def test_a_teacher_is_asked_for_the_same_numbers_or_not_at_all(coco, tmp_path, monkeypatch, capsys, request, case):
    """While a cache is written and from it without a teacher the same bits; and live, where all is kept."""
    kind, *more = CACHED[case].split()
    options = [*common(coco, tmp_path), *distilling(kind, request.getfixturevalue(f"{kind}_teacher"))]
    options += ["--val-split", "", "--pictures", "0", "--kd-distill-type", "prediction", *more]
    options += ["--kd-cache-teacher", str(tmp_path / "cache"), "--kd-cache-views", "2"]

    def student(name):
        assert main(["detect", *options, "--experiment", name]) == 0
        return load_file(tmp_path / name / "student-last.safetensors")

    runs = []
    if "--kd-cache-topk" not in more:
        with monkeypatch.context() as patch:
            live = lambda self, teacher, images, *_: (teacher(images, self.taps), None)  # noqa: E731
            patch.setattr(TeacherCache, "__call__", live)
            runs.append(student("live"))
    runs.append(student("written"))
    capsys.readouterr()

    def refuse(*args, **keywords):
        raise AssertionError("the teacher was loaded or ran though its outputs are on disk")

    monkeypatch.setattr(build, "make_teacher", refuse)
    monkeypatch.setattr(Teacher, "__call__", refuse)
    runs.append(student("read"))
    assert "16 of 16 rows are there; the teacher is not needed" in capsys.readouterr().out
    for run in runs[1:]:
        assert all(torch.equal(runs[0][key], run[key]) for key in run)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("", "feature maps and tokens take too much room"),
        (
            "--kd-distill-type prediction",
            "a row has room for --kd-cache-topk of them; pass it (1000, for example), or --square",
        ),
    ],
)
def test_what_a_cache_cannot_serve(coco, tmp_path, capsys, fcos_teacher, texts, message):
    options = [*common(coco, tmp_path), *distilling("fcos", fcos_teacher), *texts.split()]
    assert main(["detect", *options, "--kd-cache-teacher", str(tmp_path / "cache")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
