"""What is in a run's directory stays true and is never lost, whatever is resumed, refused, damaged or killed."""

import json
import os
import shutil
import signal

import pytest
import torch
from dtokd.cli import main
from dtokd.errors import UsageError
from dtokd.files import digest_of, write_tensors
from dtokd.train import checkpoint
from dtokd.train.checkpoint import load_checkpoint, load_run, save_checkpoint
from dtokd.train.engine import Engine
from dtokd.train.rundir import RunDir, student_of
from safetensors.torch import load_file

from .digits import common, distilling
from .test_train_resume import Died, die_at, same_results, start, wait_for
from .written import rows

pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder):
    """From each file's name to its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def scripted(monkeypatch, scores):
    """The evaluation of each epoch in turn, over the test's processes."""
    left = iter(scores)
    monkeypatch.setattr(Engine, "evaluate", lambda *_, **__: {"top1": next(left), "top5": 100.0, "loss": 1.0})


def epochs_of(path):
    return [int(row["epoch"]) for row in rows(path / "summary.csv")]


@pytest.fixture
def finished(digits, tmp_path):
    """A run of two epochs, and its command."""
    options = ["train", *common(digits, tmp_path), "--experiment", "x"]
    assert main(options) == 0
    return tmp_path / "x", options


def test_what_is_refused_changes_nothing(finished, teacher, digits, tmp_path, capsys):
    path, options = finished
    other = ["train", *common(digits, tmp_path), "--experiment", "y", "--model", "test_vit", "--epochs", "1"]
    assert main(other) == 0
    first = str(path / "checkpoints" / "epoch-0001.safetensors")
    foreign = str(tmp_path / "y" / "checkpoints" / "epoch-0001.safetensors")
    damaged = str(shutil.copy(first, tmp_path / "damaged.safetensors"))
    invert(damaged)
    nonsense = tmp_path / "nonsense.safetensors"
    save_checkpoint(nonsense, {**load_checkpoint(first), "ranks": [{}]})
    balanced = ["--opt", "dtoadamw", "--kd-balance", "famo", *distilling(teacher)]
    before = contents(path)
    for more, message in (
        ([], "holds a run of 2 epochs"),
        (["--resume", foreign], "is of another model (test_vit; this run trains test_resnet)"),
        (["--resume", first, *balanced], "was written with --opt sgd, this run has --opt dtoadamw"),
        (["--resume", first, "--eval-metric", "loss"], "with --eval-metric top1, this run has --eval-metric loss"),
        (["--resume", first, "--model-ema"], "with --model-ema False"),
        (["--resume", first, "--val-split", ""], "with --val-split validation"),
        (["--resume", "auto", "--seed", "3"], "with --seed 42"),
        (["--resume", first, "--layer-decay", "0.5"], "changed options: --layer-decay was None, is now 0.5"),
        (["--resume", damaged], "is damaged"),
        (["--resume", str(nonsense)], "does not fit this run"),
        (["--resume", str(path / "student.safetensors")], "holds weights, but no state of a run"),
        (["--resume", str(path / "nobody")], "there is no file"),
        (["--resume", str(path)], "is a folder"),
    ):
        assert main([*options, *more]) == 2, more
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert contents(path) == before, more


def invert(path, share=0.7):
    """Some bytes in the middle of the tensors."""
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        file.seek(int(size * share))
        held = file.read(16)
        file.seek(int(size * share))
        file.write(bytes(byte ^ 255 for byte in held))


def test_history_is_moved_aside(finished, capsys):
    """From an earlier file, with other options: what came after it is still there, and printed."""
    path, options = finished
    before = contents(path)
    first = str(path / "checkpoints" / "epoch-0001.safetensors")
    capsys.readouterr()
    assert main([*options, "--resume", first, "--lr", "0.002"]) == 0
    said = capsys.readouterr().out
    assert "--resume: --lr was 0.001, is now 0.002" in said
    aside = path / "before-resume-1"
    assert str(aside) in said
    kept = contents(aside)
    for name in ("checkpoints/epoch-0002.safetensors", "summary.csv", "args.yaml", "student-last.safetensors"):
        assert kept[name] == before[name]
        assert name in said
    assert epochs_of(path) == [0, 1]
    assert main([*options, "--resume", first]) == 0
    assert (path / "before-resume-2" / "checkpoints" / "epoch-0002.safetensors").exists()
    assert contents(aside) == kept
    # and from there it can be had again
    assert main([*options, "--resume", str(aside / "checkpoints" / "epoch-0002.safetensors")]) == 0
    assert epochs_of(path) == [0, 1]
    for name in ("checkpoints/epoch-0002.safetensors", "student-last.safetensors"):
        assert digest_of(load_file(path / name)) == digest_of(load_file(aside / name))


def test_an_undisturbed_resume_moves_nothing(finished, capsys):
    path, options = finished
    before = contents(path)
    assert main([*options, "--resume", "auto"]) == 0
    after = contents(path)
    assert after.keys() == before.keys()
    assert [n for n in after if after[n] != before[n] and n not in ("args.yaml", "log.txt", "report.html")] == []


@pytest.mark.parametrize("ema", [[], ["--model-ema", "--model-ema-decay", "0.5"]])
def test_the_best_student_is_the_one_that_the_run_calls_best(digits, tmp_path, monkeypatch, ema):
    """Best of four epochs is the fourth; of the first three it is the second, which --checkpoint-hist leaves there."""
    options = ["train", *common(digits, tmp_path), *ema, "--experiment", "x", "--epochs", "4", "--checkpoint-hist", "2"]
    scores = [30.0, 80.0, 20.0, 90.0]
    scripted(monkeypatch, [score for score in scores for _ in range(2 if ema else 1)])
    assert main(options) == 0
    held = RunDir(tmp_path / "x")
    assert list(held.checkpoints()) == [2, 3, 4]
    of_epoch = {number: digest_of(student_of(load_run(path))) for number, path in held.checkpoints().items()}
    assert digest_of(load_file(held.student)) == of_epoch[4]
    with monkeypatch.context() as patch:
        die_at(patch, 2)
        with pytest.raises(Died):
            main([*options, "--resume", str(held.checkpoints()[3])])
    assert digest_of(load_file(held.student)) == of_epoch[2]
    assert digest_of(load_file(held.last_student)) == of_epoch[3]
    assert epochs_of(held.path) == [0, 1, 2]
    assert digest_of(load_file(held.path / "before-resume-1" / "student.safetensors")) == of_epoch[4]
    scripted(monkeypatch, [10.0] * 2)
    assert main([*options, "--resume", "auto"]) == 0
    assert digest_of(load_file(held.student)) == of_epoch[2]
    assert "top1 80 in epoch 2" in held.report.read_text()


def test_a_best_student_that_is_gone(digits, tmp_path, monkeypatch, capsys):
    """Then the run calls none of the epochs before the best."""
    options = ["train", *common(digits, tmp_path), "--experiment", "x", "--epochs", "3"]
    scripted(monkeypatch, [80.0, 30.0, 90.0])
    assert main(options) == 0
    held = RunDir(tmp_path / "x")
    held.checkpoints()[1].unlink()
    capsys.readouterr()
    scripted(monkeypatch, [40.0])
    assert main([*options, "--resume", str(held.checkpoints()[2])]) == 0
    said = capsys.readouterr().out
    assert "the best is chosen among the epochs that follow" in said
    assert "best top1 40 in epoch 3" in said
    assert "top1 40 in epoch 3" in held.report.read_text()
    assert epochs_of(held.path) == [2]
    assert digest_of(load_file(held.student)) == digest_of(student_of(load_run(held.checkpoints()[3])))
    assert (held.path / "before-resume-1" / "summary.csv").exists()


def test_a_run_that_begins_with_another_ones_checkpoint(finished, monkeypatch, capsys):
    """It has the other's history, and goes on by itself from there."""
    path, options = finished
    options = ["y" if text == "x" else text for text in options]
    first = path / "checkpoints" / "epoch-0001.safetensors"
    before = contents(path)
    with monkeypatch.context() as patch:
        die_at(patch, 2)
        with pytest.raises(Died):
            main([*options, "--resume", str(first)])
    forked = path.parent / "y"
    assert epochs_of(forked) == [0]
    capsys.readouterr()
    assert main([*options, "--resume", "auto"]) == 0
    assert "going on after epoch 1 from" in capsys.readouterr().out
    assert contents(path) == before
    same_results(path, forked)


def test_a_damaged_newest_checkpoint(digits, teacher, tmp_path, capsys):
    """The one before it is taken, which is printed, and the end is that of an undisturbed run."""
    shared = [*distilling(teacher), "--opt", "dtoadamw", "--kd-balance", "dto", "--experiment", "x", "--epochs", "3"]
    for folder in ("a", "b"):
        assert main(["train", *common(digits, tmp_path / folder), *shared]) == 0
    held = RunDir(tmp_path / "b" / "x")
    invert(held.checkpoints()[3])
    held.checkpoints()[2].write_bytes(held.checkpoints()[2].read_bytes()[:2000])
    capsys.readouterr()
    assert main(["train", *common(digits, tmp_path / "b"), *shared, "--resume", "auto"]) == 0
    said = capsys.readouterr().out
    assert "epoch-0003.safetensors is damaged: its bytes are not those that were written" in said
    assert "epoch-0002.safetensors is damaged or no checkpoint" in said
    assert "going on after epoch 1 from" in said
    same_results(tmp_path / "a" / "x", tmp_path / "b" / "x")
    for path in held.checkpoints().values():
        invert(path)
    before = contents(held.path)
    assert main(["train", *common(digits, tmp_path / "b"), *shared, "--resume", "auto"]) == 2
    assert "none of the 4 checkpoints" in capsys.readouterr().err
    assert contents(held.path) == before


def test_every_byte_of_a_checkpoint_counts(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"x": torch.arange(4.0), "n": 3, "nan": float("nan")})
    assert load_checkpoint(path)["n"] == 3
    whole = path.read_bytes()
    json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")], parse_constant=pytest.fail)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            held = load_checkpoint(path)
        except UsageError:
            continue
        pytest.fail(f"byte {place} of {len(whole)}: {held}")


def crafted(path, text):
    write_tensors(path, {"x": torch.zeros(2)}, {"dtokd": text})
    return path


def signed(state):
    text = state if isinstance(state, str) else json.dumps(state)
    sum_ = checkpoint._checksum(text, {"x": torch.zeros(2)})
    return json.dumps({"format": checkpoint.FORMAT, "sha256": sum_, "state": text})


CRAFTED = {
    "no JSON": "x",
    "a list": "[]",
    "nothing": "{}",
    "a format alone": json.dumps({"format": checkpoint.FORMAT}),
    "a state that is none": json.dumps({"format": checkpoint.FORMAT, "sha256": "", "state": 3}),
    "an empty state": signed({"dict": []}),
    "a list as state": signed([]),
    "a tensor that is not there": signed({"dict": [["epoch", {"tensor": "y"}]]}),
    "two kinds": signed({"dict": [], "tuple": []}),
    "another kind": signed({"set": []}),
    "an unhashable key": signed({"dict": [[[], 1]]}),
    "a text as number": signed({"dict": [["epoch", "3"]]}),
    "deep": signed("[" * 100_000),
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_metadata_of_others(tmp_path, kind):
    with pytest.raises(UsageError, match=r"a\.safetensors (holds no state|is damaged|has format)"):
        load_run(crafted(tmp_path / "a.safetensors", CRAFTED[kind]))


def test_metadata_that_lacks_a_part(finished, tmp_path, capsys):
    """Each part of a whole checkpoint left out, and each of them of another type."""
    path, options = finished
    whole = load_checkpoint(path / "checkpoints" / "epoch-0001.safetensors")
    other, before = tmp_path / "other.safetensors", contents(path)
    for key in whole:
        for state in ({k: v for k, v in whole.items() if k != key}, {**whole, key: [[3]]}):
            save_checkpoint(other, state)
            code = main([*options, "--resume", str(other), "--epochs", "1"])
            error = capsys.readouterr().err
            assert (code, error.count("\n")) == (2, 1), (key, error)
            assert contents(path) == before


def test_damaged_lists(finished, capsys):
    path, options = finished
    whole = (path / "summary.csv").read_text()
    (path / "summary.csv").write_text(whole.replace("\n1,", "\nx,"))
    before = contents(path)
    assert main([*options, "--resume", "auto"]) == 2
    assert "summary.csv, steps.csv or generator.csv of" in capsys.readouterr().err
    assert contents(path) == before
    (path / "summary.csv").write_text(whole)
    (path / "args.yaml").write_text("{")
    assert main([*options, "--resume", "auto"]) == 0
    assert (path / "before-resume-1" / "args.yaml").read_text() == "{"


def test_two_runs_in_one_directory(digits, tmp_path, capsys):
    """The second is refused; the lock ends with a process that is killed."""
    options = ["train", *common(digits, tmp_path), "--experiment", "x", "--workers", "1"]
    process = start([*options, "--epochs", "500"])
    wait_for(tmp_path / "x" / "checkpoints" / "epoch-0001.safetensors")
    assert main([*options, "--resume", "auto"]) == 2
    assert f"x is in use by another run, process {process.pid}; wait until it has ended" in capsys.readouterr().err
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    last = max(RunDir(tmp_path / "x").checkpoints()) + 1
    assert main([*options, "--resume", "auto", "--epochs", str(last)]) == 0
    assert not (tmp_path / "x" / ".lock").exists()
    with RunDir(tmp_path / "x").locked():
        assert main([*options, "--resume", "auto"]) == 2
    assert "in use by another run of this process" in capsys.readouterr().err


def test_a_refused_run_leaves_no_folder(digits, tmp_path):
    assert main(["train", *common(digits, tmp_path / "runs"), "--experiment", "x", "--model", "nobody"]) == 2
    assert not (tmp_path / "runs").exists()
