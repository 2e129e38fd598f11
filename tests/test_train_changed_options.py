"""Options that change at `--resume`: the schedule and the optimizer follow them from the epoch that begins."""

import shutil

import pytest
from dtokd.cli import main
from dtokd.train.checkpoint import load_checkpoint
from dtokd.train.rundir import RunDir

from .digits import common
from .test_train_resume import signal_at
from .written import rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated"),
    pytest.mark.usefixtures("one_thread"),
]


def command(digits, output, *more):
    return ["train", *common(digits, output), "--experiment", "x", "--log-interval", "1", *more]


def rates(output):
    return [float(row["lr"]) for row in rows(output / "x" / "summary.csv")]


def groups(output, epoch):
    state = load_checkpoint(RunDir(output / "x").checkpoints()[epoch])
    return state["stepper"]["optimizer"]["param_groups"]


SCHEDULES = {
    "more epochs": ("--epochs 2", "--epochs 4"),
    "a finished run, by updates": ("--epochs 2 --sched-on-updates", "--epochs 4"),
    "learning rate": ("--epochs 2", "--epochs 4 --lr 0.004"),
    "another schedule": ("--epochs 2", "--epochs 4 --sched step --decay-epochs 1 --decay-rate 0.5"),
    "warmup": ("--epochs 2 --warmup-epochs 1", "--epochs 4 --warmup-epochs 3 --warmup-lr 0.0001"),
    "smallest": ("--epochs 3 --min-lr 0.0005", "--epochs 4 --min-lr 0.0001"),
    "batches of another size": ("--epochs 2 --sched-on-updates", "--epochs 4 --sched-on-updates -b 8"),
    "milestones": ("--epochs 2 --sched multistep --decay-milestones 1", "--epochs 4 --decay-milestones 3"),
    "plateau after the end": ("--epochs 2 --min-lr 0", "--epochs 4 --sched plateau"),
    "constant after the end": ("--epochs 2 --min-lr 0", "--epochs 4 --sched none"),
    "constant": ("--epochs 2 --sched none", "--epochs 4 --sched none --lr 0.003"),
    "plateau": ("--epochs 2", "--epochs 4 --sched plateau --lr 0.003"),
    "plateau's warmup": ("--epochs 2 --sched plateau", "--epochs 4 --sched plateau --warmup-epochs 3"),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_schedule_is_that_of_the_options(digits, tmp_path, capsys, kind):
    """The epochs that follow have the learning rates of a run that had these options from the beginning."""
    before, after = (text.split() for text in SCHEDULES[kind])
    assert main(command(digits, tmp_path / "a", *before)) == 0
    assert main(command(digits, tmp_path / "b", *before, *after)) == 0
    capsys.readouterr()
    assert main(command(digits, tmp_path / "a", *before, *after, "--resume", "auto")) == 0
    said = capsys.readouterr().out
    assert said.count("--resume: --epochs was") == 1
    done = int(before[1])
    resumed, anew = rates(tmp_path / "a"), rates(tmp_path / "b")
    assert resumed[done:] == anew[done:]
    assert min(resumed) > 0
    if resumed[done] != (last := groups(tmp_path / "a", done)[0]["lr"]):
        assert f"the learning rate goes on at {resumed[done]:.6g}; it was {last:.6g}" in said


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_the_optimizer_has_the_options(digits, tmp_path, capsys, opt):
    first = command(digits, tmp_path, "--opt", opt, "--weight-decay", "0.1", "--epochs", "1")
    assert main(first) == 0
    more = ["--weight-decay", "0.3", "--momentum", "0.8", "--opt-betas", "0.8", "0.9", "--epochs", "2"]
    assert main([*first, *(more if opt == "adamw" else more[:4] + more[-2:]), "--resume", "auto"]) == 0
    group = groups(tmp_path, 2)[-1]
    assert group["weight_decay"] == 0.3
    assert group["betas"] == (0.8, 0.9) if opt == "adamw" else group["momentum"] == 0.8
    assert "--weight-decay was 0.1, is now 0.3" in capsys.readouterr().out


def test_what_the_optimizer_remembers_in_its_groups_stays(digits, tmp_path):
    """timm's Lookahead counts its steps there."""
    first = command(digits, tmp_path, "--opt", "lookahead_adamw", "--epochs", "1")
    assert main(first) == 0
    assert main([*first, "--epochs", "2", "--weight-decay", "0.1", "--resume", "auto"]) == 0
    assert [group["lookahead_step"] for group in groups(tmp_path, 2)] == [8, 8]


def test_options_of_the_beginning_have_no_effect_and_are_told_so(digits, teacher, tmp_path, capsys):
    first = command(digits, tmp_path, "--epochs", "1")
    assert main(first) == 0
    assert main([*first, "--epochs", "2", "--initial-checkpoint", str(teacher), "--resume", "auto"]) == 0
    assert "is now" in (said := capsys.readouterr().out)
    assert "which has no effect: the weights are the checkpoint's" in said


def test_the_fused_optimizer_takes_over_from_the_one_it_stands_for(digits, teacher, tmp_path):
    distilling = ["--kd-model-name", "test_resnet", "--kd-teacher-path", str(teacher)]
    first = command(digits, tmp_path, *distilling, "--epochs", "1")
    assert main([*first, "--opt", "adamw"]) == 0
    more = ["--opt", "dtoadamw", "--kd-balance", "dto", "--epochs", "2", "--resume", "auto"]
    assert main([*first, *more]) == 0
    moments = load_checkpoint(RunDir(tmp_path / "x").checkpoints()[2])["stepper"]["optimizer"]["state"].values()
    assert {int(held["step"]) for held in moments} == {8}


def test_other_objectives_have_other_columns(digits, teacher, tmp_path, capsys):
    first = command(digits, tmp_path, "--kd-model-name", "test_resnet", "--kd-teacher-path", str(teacher))
    first += ["--opt", "dtoadamw", "--kd-balance", "dto"]
    assert main([*first, "--epochs", "1"]) == 0
    before = (tmp_path / "x" / "steps.csv").read_text()
    assert main([*first, "--epochs", "2", "--kd-distill-type", "dkd", "--resume", "auto"]) == 0
    assert (tmp_path / "x" / "before-resume-1" / "steps.csv").read_text() == before
    lines = rows(tmp_path / "x" / "steps.csv")
    assert [line["step"] for line in lines] == ["4", "5", "6", "7"]
    assert "weight_dkd" in lines[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-b", "8"], "in the middle of an epoch with --batch-size 16, this run has 8"),
        (["--grad-accum-steps", "2"], "with --grad-accum-steps 1, this run has 2"),
        (["--aug-repeats", "2"], "with --aug-repeats 0, this run has 2"),
        (["--train-split", "validation"], "with --train-split train, this run has validation"),
    ],
)
def test_in_the_middle_of_an_epoch_the_batches_stay(digits, tmp_path, monkeypatch, capsys, more, message):
    options = command(digits, tmp_path, "--epochs", "2")
    with monkeypatch.context() as patch:
        signal_at(patch, [6])
        assert main(options) == 143
    assert main([*options, "--resume", "auto", *more]) == 2
    assert message in capsys.readouterr().err
    assert main([*options, "--resume", str(RunDir(tmp_path / "x").checkpoints()[1]), *more]) == 0


def test_in_the_middle_of_an_epoch_the_samples_stay(tmp_path, monkeypatch, capsys):
    from .digits import write_digits

    data = write_digits(tmp_path / "data")
    options = command(data, tmp_path, "--epochs", "2")
    with monkeypatch.context() as patch:
        signal_at(patch, [6])
        assert main(options) == 143
    next((data / "train").rglob("*.png")).unlink()
    assert main([*options, "--resume", "auto"]) == 2
    assert "in the middle of an epoch of 64 samples, --data-dir now has 63" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["renamed", "reversed"])
def test_the_classes_stay(digits, tmp_path, capsys, kind):
    """Folders with other names, or the same in another order: a label would mean another class."""
    data = shutil.copytree(digits, tmp_path / "data")
    more = []
    if kind == "reversed":
        (tmp_path / "classes.txt").write_text("".join(f"{i}\n" for i in range(10)))
        more = ["--class-map", str(tmp_path / "classes.txt")]
    options = [*command(data, tmp_path), *more]
    assert main([*options, "--epochs", "1"]) == 0
    if kind == "renamed":
        for split in ("train", "validation"):
            (data / split / "0").rename(data / split / "zebra")
    else:
        (tmp_path / "classes.txt").write_text("".join(f"{i}\n" for i in reversed(range(10))))
    before = {path: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*options, "--resume", "auto"]) == 2
    error = capsys.readouterr().err
    assert "has learned class 0 as '0'" in error
    assert ("'1' there" if kind == "renamed" else "'9' there") in error
    assert {path: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()} == before
