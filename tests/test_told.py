"""What a run tells: before its first step, while it runs, and in its report; and what the command line tells."""

import io
import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from dtokd import cli, values
from dtokd.cli import main
from dtokd.confusion import ConfusionEvaluator
from dtokd.errors import UsageError
from dtokd.monitor import BalanceLogger
from dtokd.report.classes import classes_part
from dtokd.report.conclusion import sentences
from dtokd.report.recorded import Recorded
from dtokd.train import about, absent, progress
from dtokd.train import options as train_options
from dtokd.train.reading import parse
from rich.console import Console
from safetensors.torch import load_file, save_file
from timm.task import ClassificationEvaluator

import dtokd_kernels as dk

from .coco import FCOS, write_coco
from .coco import common as coco_options
from .digits import common, distilling
from .refused import refused

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(digits, teacher, tmp_path_factory):
    """A run without a teacher and one with; and what the second one has printed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    options = ["train", *common(digits, folder), "--log-interval", "2"]
    with pytest.MonkeyPatch.context() as patch:
        told = io.StringIO()
        assert main([*options, "--experiment", "alone"]) == 0
        patch.setattr(progress, "Console", lambda **_: Console(file=told, width=400))
        taught = [*distilling(teacher), "--kd-balance", "dto", "--opt", "dtoadamw"]
        taught += ["--baseline", str(folder / "alone")]
        assert main([*options, *taught, "--experiment", "taught"]) == 0
    return folder, told.getvalue()


def test_lines_of_a_run(runs):
    """From the first iteration on: losses, learning rate, images per second, and what remains; the same in log.txt."""
    folder, told = runs
    first = next(line for line in told.splitlines() if line.startswith("epoch 1/2  1/4"))
    assert re.search(r"loss \S+  task \S+  kl \S+  lr 0.001  \S+ it/s  \S+ img/s", first)
    middle = next(line for line in told.splitlines() if line.startswith("epoch 1/2  2/4"))
    assert re.search(r"img/s  \d+ s left  \d+ s to the end$", middle)
    assert re.search(r"epoch 2/2  \d+% of an iteration's time is the teacher's", told)
    assert "student test_resnet: 374 k parameters, 4.1 M MACs per image" in told
    assert (folder / "taught" / "log.txt").read_text().splitlines() == [line.rstrip() for line in told.splitlines()]


def test_a_line_comes_though_iterations_are_slow(monkeypatch):
    """Also where --log-interval is far away; it reads nothing from the device."""
    told = io.StringIO()
    shown = progress.Progress(3, Console(file=told, width=200))
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with shown.epoch(0, 10) as epoch:
        for done in range(1, 5):
            clock[0] += 20
            epoch.advance(done, 8 * done)
    (line, _) = told.getvalue().splitlines()
    expected = "epoch 1/3 2/10 0.05 it/s 0.4 img/s 2 min 40 s left 9 min 20 s to the end"
    assert " ".join(line.split()) == expected


def test_lines_are_printed_as_they_are():
    """Rich would make a picture of :100:, and an attribute of [b]."""
    told = io.StringIO()
    progress.Progress(1, Console(file=told, width=200)).say("[b] every:100:overlap")
    assert told.getvalue() == "[b] every:100:overlap\n"


def test_macs_are_counted():
    """Of two layers by hand: a convolution and a matrix."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(4 * 64, 5))
    model.train()
    assert about.count_macs(model, torch.zeros(1, 3, 8, 8)) == 64 * 4 * 27 + 4 * 64 * 5
    assert model.training
    assert about.count_macs(model, torch.zeros(1, 2)) is None  # it does not take it


def test_teacher_that_knows_nothing_is_told(runs, teacher):
    """Untrained, so about as good as chance; its metrics are those of an evaluation of it."""
    folder, told = runs
    held = json.loads((folder / "taught" / "about.json").read_text())
    (known,) = held["teachers"]
    assert "warning: the teacher test_resnet is right in 10 % of the validation images" in told
    assert "always naming the most frequent class would be right in 16.7 %" in known["warning"]
    assert known["metrics"]["top1"] == 10
    assert held["data"][0].startswith("train: 64 images of 10 classes")
    assert "teachers" in json.loads((folder / "alone" / "about.json").read_text())


class _Oracle(torch.nn.Module):
    """A teacher of the digits that reads the label from where the test has put it."""

    num_classes = 10

    def forward(self, images):
        return torch.nn.functional.one_hot((images[:, 0, 0, 0] * 10).round().long(), 10).float()


@pytest.mark.parametrize(("wrong", "warned"), [(0, False), (1.0, True)])
def test_only_a_teacher_that_knows_nothing_is_told(wrong, warned):
    """The limit is what guessing the most frequent class gives, with its luck."""
    target = torch.arange(200) % 10
    images = torch.zeros(200, 1, 1, 1) + ((target + wrong) % 10)[:, None, None, None] / 10
    evaluator = ConfusionEvaluator()
    evaluator.update(_Oracle()(images), target)
    told = about._untrained("t", evaluator.compute(), evaluator, imitated=True)
    assert bool(told) == warned


def test_the_teachers_evaluation_changes_nothing(digits, teacher, tmp_path, monkeypatch):
    """With and without it the student has the same bits; a run that goes on does not judge it again."""
    options = ["train", *common(digits, tmp_path), *distilling(teacher), "--epochs", "1", "--mixup", "0.2"]
    judged = []
    judge = about._judge
    monkeypatch.setattr(about, "_judge", lambda *a: judged.append(1) or judge(*a))
    assert main([*options, "--experiment", "a"]) == 0
    assert main([*options, "--experiment", "b", "--no-kd-eval-teacher"]) == 0
    one, two = (load_file(tmp_path / name / "student-last.safetensors") for name in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert judged == [1]
    assert main([*options, "--experiment", "a", "--resume", "auto", "--epochs", "2"]) == 0
    assert judged == [1]
    other = timm.create_model("test_resnet", num_classes=10)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    options[options.index(str(teacher))] = str(tmp_path / "other.safetensors")
    assert main([*options, "--experiment", "a", "--resume", "auto", "--epochs", "3"]) == 0
    assert judged == [1, 1]


@pytest.mark.parametrize(("name", "value"), [("square", True), ("max_size", 64), ("amp_dtype", "bfloat16")])
def test_a_teacher_is_judged_again_with_other_images(name, value):
    """A run that goes on with another option keeps no metrics that depend on it."""
    settings = {"model": "x", "square": False, "max_size": 1333, "amp_dtype": "float16"}
    task, known = types.SimpleNamespace(get_eval_model=lambda: torch.nn.Linear(1, 1), lessons=[]), about.Known([], None)
    one, two = (
        about.find_out(types.SimpleNamespace(task=task, options=types.SimpleNamespace(**held)), None, known, {})
        for held in (settings, {**settings, name: value})
    )
    assert one["judged_with"] != two["judged_with"]


def test_teachers_of_one_architecture(digits, teacher, tmp_path, capsys):
    """Each keeps its own metrics when the run goes on, and its own line in the report."""
    other = timm.create_model("test_resnet", num_classes=10)
    with torch.no_grad():
        other.get_classifier().bias[3] += 100
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    options = ["train", *common(digits, tmp_path), "--experiment", "x", "--kd-model-name", "test_resnet", "test_resnet"]
    options += ["--kd-teacher-path", str(teacher), str(tmp_path / "other.safetensors"), "--epochs"]
    assert main([*options, "1"]) == 0
    before = json.loads((tmp_path / "x" / "about.json").read_text())["teachers"]
    assert before[0]["metrics"] != before[1]["metrics"]
    assert main([*options, "2", "--resume", "auto"]) == 0
    assert json.loads((tmp_path / "x" / "about.json").read_text())["teachers"] == before
    page = (tmp_path / "x" / "report.html").read_text()
    assert all(f"teacher test_resnet ({number}): top1" in page for number in (1, 2))


def test_teacher_of_a_detector_is_judged(tmp_path, monkeypatch, capsys):
    """By AP; an untrained one is told."""
    data = write_coco(tmp_path / "data")
    options = ["detect", *coco_options(data, tmp_path), *FCOS, "--pictures", "0", "--epochs", "1"]
    assert main([*options, "--experiment", "teacher"]) == 0
    weights = tmp_path / "teacher" / "student.safetensors"
    more = ["--kd-model-name", FCOS[1], "--kd-model-kwargs", FCOS[3], "--kd-teacher-path", str(weights)]
    capsys.readouterr()
    assert main([*options, *more, "--experiment", "x"]) == 0
    told = capsys.readouterr().out
    (known,) = json.loads((tmp_path / "x" / "about.json").read_text())["teachers"]
    row = (tmp_path / "teacher" / "summary.csv").read_text().splitlines()
    assert known["metrics"]["ap"] == float(row[1].split(",")[row[0].split(",").index("eval_ap")])
    assert "warning: the teacher fcos:test_resnet has an AP of" in told
    assert "MACs per image" in told
    assert "Average precision of each class" in (tmp_path / "x" / "report.html").read_text()


def test_confusion_is_counted_beside_timms_metrics():
    """In batches and as a whole; samples beyond the limit count for neither."""
    torch.manual_seed(0)
    output, target = torch.randn(50, 4), torch.randint(4, (50,))
    mine, theirs = (kind(max_samples=45) for kind in (ConfusionEvaluator, ClassificationEvaluator))
    for start in range(0, 50, 20):
        for evaluator in (mine, theirs):
            evaluator.update(output[start : start + 20], target[start : start + 20])
    assert mine.compute() == dict(theirs.compute())
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for true, said in zip(target[:45].tolist(), output[:45].argmax(1).tolist(), strict=True):
        expected[true, said] += 1
    assert torch.equal(mine.matrix, expected)
    assert mine.details()["matrix"] == expected.tolist()
    many = ConfusionEvaluator()
    many.update(torch.eye(40)[[1, 1, 2]], torch.tensor([1, 3, 2]))
    told = many.details()
    assert told["confused"] == [[3, 1, 1]]
    assert told["accuracy"][:4] == [None, 100.0, 100.0, 0.0]
    assert "matrix" not in told


def test_classes_of_the_best_epoch(runs):
    folder, _ = runs
    told = json.loads((folder / "taught" / "classes.json").read_text())
    assert sum(map(sum, told["matrix"])) == 30
    assert told["names"] == [str(i) for i in range(10)]
    page = classes_part({**told, "names": ["<0>", *told["names"][1:]]})
    assert page.count("<tr>") == 11
    assert "&lt;0&gt;" in page
    assert classes_part({"epoch": "x", "matrix": [[1]]}) == ""  # changed by hand
    ap = classes_part({"epoch": 0, "names": ["a", "b"], "ap": [0.5, 0.25], "objects": [3, 4]})
    assert ap.index("0.250") < ap.index("0.500")


def test_report_begins_with_a_conclusion(runs):
    """Against baseline and teacher, which are lines in the figure too; it is there before the run has ended."""
    folder, _ = runs
    page = (folder / "taught" / "report.html").read_text()
    begin = page[: page.index("<figure>")]
    for part in ("its baseline alone, trained without a teacher: top1", "the teacher test_resnet: top1",
                 "The objective", "The teacher takes", "64 images of 10 classes", "374 k parameters"):  # fmt: skip
        assert part in begin, part
    assert '<span><i class="s2"></i>baseline alone: top1</span>' in page
    assert "teacher test_resnet: top1</span>" in page


def test_report_grows_while_the_run_goes_on(digits, tmp_path, monkeypatch):
    from dtokd.train import fit as training

    seen = []
    epoch = training._epoch

    def watched(run, *arguments):
        seen.append(run.report.exists() and run.report.read_text())
        return epoch(run, *arguments)

    monkeypatch.setattr(training, "_epoch", watched)
    assert main(["train", *common(digits, tmp_path), "--experiment", "x"]) == 0
    assert not seen[0]
    assert "1 finished epochs" in seen[1]
    assert (tmp_path / "x" / "README.md").exists()


@pytest.mark.parametrize(
    ("own", "base", "teacher", "first", "second"),
    [
        (70.0, 60.0, 80.0, "better than its baseline", "not as good as the teacher"),
        (60.0, 70.0, 50.0, "worse than its baseline", "better than the teacher"),
        (60.0, 60.0, 60.0, "as good as its baseline", "as good as the teacher"),
    ],
)
def test_conclusions(own, base, teacher, first, second):
    epochs = {"epoch": [0.0, 1.0], "eval_top1": [1.0, own], "share_task": [0.5, 0.01], "share_kl": [0.5, 0.99]}
    about = {"teachers": [{"name": "t", "metrics": {"top1": teacher}}]}
    run = Recorded(Path("r"), {"eval_metric": "top1"}, epochs, about)
    told = " ".join(sentences(run, Recorded(Path("b"), {}, {"epoch": [0.0], "eval_top1": [base]})))
    assert first in told
    assert f"It is {second} t" in told
    assert "kl has the largest share of the gradient, 99% in the mean over the last epoch; the others are" in told
    lower = Recorded(Path("r"), {"eval_metric": "loss"}, {"eval_loss": [0.5]})
    assert "better than" in next(sentences(lower, Recorded(Path("b"), {}, {"eval_loss": [0.7]})))


def test_a_baseline_with_another_schedule():
    """What differs besides teacher and balance is told; the optimizer that ours stands for is no difference."""
    epochs = {"epoch": [0.0], "eval_top1": [70.0]}
    settings = {"eval_metric": "top1", "model": "a", "epochs": 30, "opt": "dtosgd", "seed": 1, "kd_balance": "dto"}
    run = Recorded(Path("r"), settings, epochs)

    def told(**changes):
        before = {**settings, "opt": "sgd", "seed": 2, "kd_balance": "none", **changes}
        return " ".join(sentences(run, Recorded(Path("b"), before, epochs)))

    assert "differ in" not in told()
    assert "They also differ in --epochs, which may be the reason." in told(epochs=10)
    assert "They also differ in --model, --opt," in told(model="b", opt="adamw")


@pytest.mark.parametrize(("rule", "told"), [("share", "50% "), ("logsum", "99% ")])
def test_who_has_the_gradient(rule, told):
    """Of gradients of length 1 and 100 equal shares take weights of 99 and 1 %, equal weights shares of 1 and 99 %."""
    found = {"epoch": 0.0}
    sink = types.SimpleNamespace(write=lambda rows, means: found.update(means), close=lambda: None)
    with BalanceLogger([sink]) as logger:
        gram = torch.diag(torch.tensor([1.0, 1e4], dtype=torch.float64))
        logger.log(dk.balance(gram, [1.0, 1.0], dk.weighting.from_name(rule)))
    epochs = {name: [value] for name, value in found.items()}
    (text,) = sentences(Recorded(Path("r"), {"eval_metric": "top1"}, epochs), None)
    assert told in text
    assert ("hardly trained" in text) == (rule == "logsum")


def test_report_over_several_runs(runs, capsys, tmp_path):
    folder, _ = runs
    paths = [str(folder / name) for name in ("alone", "taught")]
    assert main(["report", *paths, "--baseline", paths[0]]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "runs.html")
    page = (folder / "runs.html").read_text()
    assert page.count("<tr>") >= 3
    for part in ("to the baseline", "kd_teacher_path", "Validation: top1", "baseline alone", "taught: data and models"):
        assert part in page, part
    assert main(["report", *paths, "--output", str(tmp_path / "p.html")]) == 0
    assert "--baseline: " in refused(capsys, "report", paths[0], "--baseline", paths[1])
    assert "--output: the page of one run" in refused(capsys, "report", paths[0], "--output", tmp_path / "p.html")
    assert "is no run directory" in refused(capsys, "report", paths[0], tmp_path)


def test_dry_run(digits, teacher, tmp_path, capsys):
    """Tells data, time and memory, finds a bad image, and writes nothing."""
    data = shutil.copytree(digits, tmp_path / "data")
    for image in sorted((data / "train" / "3").iterdir())[:1]:
        image.write_bytes(b"")
    options = ["train", *common(data, tmp_path / "runs"), *distilling(teacher), "--dry-run", "--opt", "dtoadamw"]
    options += ["--kd-balance", "dto", "--kd-cache-teacher", str(tmp_path / "cache")]
    assert main(options) == 0
    told = capsys.readouterr().out
    assert re.search(
        r"dry run: an iteration of 16 images takes \S+ s, of which the teacher takes \d+%; \S+ img/s", told
    )
    assert re.search(r"an epoch \(4 iterations and 2 batches of validation\) takes about .*, 2 epochs ", told)
    assert "GiB of memory" in told
    assert "skipped image: train: " in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    coco = write_coco(tmp_path / "coco")
    assert main(["detect", *coco_options(coco, tmp_path / "runs"), *FCOS, "--dry-run"]) == 0
    assert "dry run: an epoch" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


class _Tracked:
    """Stands for wandb and mlflow, which are not installed here: notes what is called."""

    def __init__(self):
        self.calls = []
        self.info = types.SimpleNamespace(run_id="abc")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments, **more):
            self.calls.append((name, arguments, more))
            return self

        return call

    def of(self, name):
        return [(arguments, more) for called, arguments, more in self.calls if called == name]


def test_trackers(digits, teacher, tmp_path, monkeypatch, capsys):
    """Both get the balanced steps' means and each epoch's numbers; a run that goes on is the same one there."""
    wandb, mlflow = _Tracked(), _Tracked()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    options = ["train", *common(digits, tmp_path / "study"), *distilling(teacher), "--kd-balance", "dto"]
    options += ["--opt", "dtoadamw", "--experiment", "x", "--log-wandb", "--log-mlflow"]
    assert main([*options, "--epochs", "1"]) == 0
    assert main([*options, "--epochs", "2", "--resume", "auto"]) == 0
    first, second = (more for _, more in wandb.of("init"))
    assert (first["project"], first["name"]) == ("study", "x")
    assert first["id"] == second["id"]
    assert first["config"]["lr"] == 0.001
    logged = [arguments[0] for arguments, _ in wandb.of("log")]
    assert [row["epoch/step"] for row in logged if "epoch/step" in row] == [3, 7]
    assert all(0 <= row["dto/weight_task"] <= 1 for row in logged if "dto/weight_task" in row)
    assert mlflow.of("set_experiment") == [(("study",), {})] * 2
    assert [more for _, more in mlflow.of("start_run")] == [{"run_name": "x"}, {"run_id": "abc"}]
    steps = [more["step"] for arguments, more in mlflow.of("log_metrics") if "train/loss" in arguments[0]]
    assert steps == [3, 7]
    assert wandb.of("finish")
    assert mlflow.of("end_run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    told = refused(capsys, *options, "--experiment", "y")
    assert "--log-wandb: the package wandb cannot be imported" in told
    assert not (tmp_path / "study" / "y").exists()


def test_data_directory_stands_where_timm_has_it(capsys):
    parser = cli._parser()[1]["train"]
    options = parse(parser, ["--lr", "1", "imagenet", "--model", "resnet18"])
    assert (str(options.data_dir), "data" in vars(options)) == ("imagenet", False)
    assert str(parse(cli._parser()[1]["detect"], ["coco"]).data_dir) == "coco"
    with pytest.raises(UsageError, match="--data-dir: a, but the command also names b"):
        parse(parser, ["b", "--data-dir", "a"])


def test_name_of_a_run_stays(digits):
    """With more epochs and on another device, so that --resume auto finds it; not with other options."""

    def name(*more):
        return train_options.experiment_name(parse(cli._parser()[1]["train"], [str(digits), *more]))

    assert len({name(), name("--epochs", "7"), name("--device", "cpu"), name("--log-wandb"), name("-j", "1")}) == 1
    assert name() != name("--lr", "0.3")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--epocs", "3"], "did you mean --epochs?"),
        (["train", "--batch_size", "3"], "did you mean --batch-size?"),
        (["detect", "--imgsize=3"], "did you mean --img-size?"),
        (["train", "--aug-splits", "3"], "an option of timm's train.py that is not here: augmentation splits"),
        (["train", "--qqq"], "dtokd train --help lists the options"),
        (["trian"], "did you mean train?"),
        (["eval", "--chekpoint", "x"], "did you mean --checkpoint?"),
        (["fly"], "choose from train, detect"),
    ],
)
def test_mistyped(capsys, words, told):
    assert told in refused(capsys, *words)


def test_options_of_timm_that_are_absent():
    """None of them is there, and the page lists each with what stands for it."""
    known = {text for action in cli._parser()[1]["train"]._actions for text in action.option_strings}
    assert not known & set(absent.ABSENT)
    page = (cli.Path(__file__).parents[1] / "docs" / "cli-train.md").read_text()
    for option, instead in absent.ABSENT.items():
        assert f"| `{option}` | {instead} |" in page, option


@pytest.mark.parametrize("command", ["train", "detect", "compare", "predict", "export"])
def test_help_shows_every_default(command):
    parser = cli._parser()[1][command]
    text = parser.format_help()
    assert len(text[: text.index("\n\n")].splitlines()) < 5  # no page of usage
    formatter = values.Help("x")
    for action in parser._actions:
        if action.option_strings and action.nargs != 0:
            shown = formatter._format_action(action)
            assert re.search(r"default[:)]", " ".join(shown.split())), shown


def test_version_and_completion(capsys, monkeypatch):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert f"timm {timm.__version__}" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "shtab", None)
        assert "pip install 'dtokd-kernels[completion]'" in refused(capsys, "completion", "bash")
    pytest.importorskip("shtab", reason="no shtab")
    assert main(["completion", "bash"]) == 0
    assert "--kd-balance" in capsys.readouterr().out
