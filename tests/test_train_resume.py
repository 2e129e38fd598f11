"""`dtokd train --resume`: an interrupted run ends as an undisturbed one, and files are whole or not there."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dtokd import files
from dtokd.cli import main
from dtokd.errors import UsageError
from dtokd.train.checkpoint import load_checkpoint, save_checkpoint
from dtokd.train.engine import Engine
from dtokd.train.images import CheckedImages
from dtokd.train.rundir import RunDir
from safetensors.torch import load_file

from .digits import common, distilling
from .written import rows

pytestmark = pytest.mark.usefixtures("one_thread")


class Died(Exception):
    """In the place of a kill."""


def die_at(monkeypatch, iteration):
    """In that optimizer step, counted over the process."""
    step, count = Engine._step, [0]

    def dying(self):
        count[0] += 1
        if count[0] == iteration:
            raise Died
        step(self)

    monkeypatch.setattr(Engine, "_step", dying)


def differences(a, b, where="state"):
    """Where two nested states are not the same bits; the order of a dict's keys does not count."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        return [found for key in a for found in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        return [found for i, x in enumerate(a) for found in differences(x, b[i], f"{where}.{i}")]
    return [] if a == b or a != a else [where]


#: Options that say where something is.
NAMES = ("output", "experiment", "resume", "kd_cache_teacher")
#: Columns that are never twice the same.
TIMES = ("seconds", "iteration_seconds", "teacher_seconds")


def same_results(a, b):
    """All that a run leaves, but times and names."""
    last = max(RunDir(a).checkpoints())
    first, second = (load_checkpoint(RunDir(p).checkpoints()[last]) for p in (a, b))
    for state in (first, second):
        state["options"] = {k: v for k, v in state["options"].items() if k not in NAMES}
    assert differences(first, second) == []
    for name in ("summary.csv", "steps.csv"):
        if (a / name).exists():
            one, two = rows(a / name), rows(b / name)
            for row in (*one, *two):
                [row.pop(key, None) for key in TIMES]
            assert one == two, name
    for name in ("student.safetensors", "student-last.safetensors"):
        one, two = load_file(a / name), load_file(b / name)
        assert all(torch.equal(one[key], two[key]) for key in one)


def die_and_resume(options, folder, monkeypatch, step):
    """The run in folder/a/x once more, in folder/b, ended abruptly in this step of its second epoch."""
    options = [str(folder / "b") if text == str(folder / "a") else text for text in options]
    with monkeypatch.context() as patch:
        die_at(patch, step)
        with pytest.raises(Died):
            main([*options, "--resume", "auto"])
    assert list(RunDir(folder / "b" / "x").checkpoints()) == [0, 1]
    torch.rand(7)  # the new process's generators are elsewhere
    assert main([*options, "--resume", "auto"]) == 0
    same_results(folder / "a" / "x", folder / "b" / "x")


def stop_and_resume(options, folder, monkeypatch, steps):
    """The same, ended by SIGTERM in each of these steps, counted over all processes."""
    options = [str(folder / "b") if text == str(folder / "a") else text for text in options]
    signal_at(monkeypatch, steps)
    for _ in steps:
        assert main([*options, "--resume", "auto"]) == 143
        torch.rand(7)  # the new process's generators are elsewhere
    assert RunDir(folder / "b" / "x").stopped.exists()
    assert main([*options, "--resume", "auto"]) == 0
    assert not RunDir(folder / "b" / "x").stopped.exists()
    same_results(folder / "a" / "x", folder / "b" / "x")


VARIANTS = {
    "fused": "--opt dtoadamw --kd-balance famo --model-ema --drop 0.2 --workers 0 --reprob 0.5 --mixup 0.2 "
    "--sched-on-updates --warmup-epochs 1",
    "workers": "--opt dtosgd --kd-balance rlw --amp --amp-dtype float16 --aa rand-m5 --workers 2 --reprob 0.5",
    "filled": "--opt adamw --kd-balance amortized --kd-balance-gram ema:0.9 --kd-distill-type feature --workers 0",
    "timm": "--opt sgd --sched plateau --cutmix 1 --workers 0",
    "heldout": "--opt dtoadamw --kd-balance heldout --kd-held-out 0.25 --kd-held-out-every 2 --drop 0.2 --workers 0",
    "whilebetter": "--opt adamw --kd-balance whilebetter --kd-held-out 0.25 --kd-held-out-every 2 --workers 0",
    # within its window; before it is frozen; with averages of the losses, and of the gates' cosines
    "auto": "--opt adamw --kd-balance auto --kd-balance-kwargs window=4 --kd-held-out 0.25 --kd-held-out-every 2 "
    "--workers 0",
    "share": "--opt dtoadamw --kd-balance share --kd-balance-kwargs freeze_after=8 --workers 0",
    "reachable": "--opt dtosgd --kd-balance reachable --workers 0",
    "taskfirst": "--opt dtoadamw --kd-balance taskfirst --kd-balance-kwargs patience=4 --workers 0",
}


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_is_the_undisturbed_one(digits, teacher, tmp_path, monkeypatch, variant):
    """Killed in the second of three epochs, at its second step; bit for bit, on a CPU."""
    options = ["train", *common(digits, tmp_path / "a"), *distilling(teacher), *VARIANTS[variant].split()]
    options += ["--experiment", "x", "--epochs", "3", "--log-interval", "1"]
    assert main(options) == 0
    die_and_resume(options, tmp_path, monkeypatch, 6)


def signal_at(monkeypatch, iterations):
    """SIGTERM in these optimizer steps, counted over the test's processes."""
    step, count = Engine._step, [0]

    def signalled(self):
        count[0] += 1
        if count[0] in iterations:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self)

    monkeypatch.setattr(Engine, "_step", signalled)


STOPS = {
    # before each worker had a batch, after that, in two iterations in a row, at the end of an epoch, in the next one
    "fused": ([1, 6, 7, 8, 11], VARIANTS["fused"]),
    "workers": ([1, 4, 13], VARIANTS["workers"]),
    "filled": ([1, 4, 5], VARIANTS["filled"] + " --grad-accum-steps 3"),
    "timm": ([7, 9, 15], VARIANTS["timm"] + " --aug-repeats 2"),
    # between the first and the last batch of the held-out images
    "heldout": ([2], VARIANTS["heldout"]),
}


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize("variant", STOPS)
def test_stopped_run_goes_on_in_the_middle_of_an_epoch(digits, teacher, tmp_path, monkeypatch, variant):
    """Two epochs of eight iterations; bit for bit, on a CPU."""
    stops, more = STOPS[variant]
    options = ["train", *common(digits, tmp_path / "a"), *distilling(teacher), *more.split()]
    options += ["--experiment", "x", "-b", "8", "--log-interval", "2"]
    assert main(options) == 0
    stop_and_resume(options, tmp_path, monkeypatch, stops)


def test_batches_that_were_seen_are_not_read_again(digits, tmp_path, monkeypatch):
    """Of four in an epoch."""
    options = ["train", *common(digits, tmp_path), "--experiment", "x", "--epochs", "1", "--val-split", ""]
    signal_at(monkeypatch, [3])
    assert main(options) == 143
    read, inner = [], CheckedImages.__getitem__
    monkeypatch.setattr(CheckedImages, "__getitem__", lambda self, index: read.append(index) or inner(self, index))
    assert main([*options, "--resume", "auto"]) == 0
    assert len(read) == 16


def test_stopped_run_and_another_way_on(digits, tmp_path, monkeypatch, capsys):
    """From an earlier checkpoint what was done since is forgotten; other workers are no obstacle."""
    options = ["train", *common(digits, tmp_path), "--experiment", "x"]
    signal_at(monkeypatch, [6])
    assert main(options) == 143
    run_dir = RunDir(tmp_path / "x")
    kept = str(shutil.copy(run_dir.stopped, tmp_path / "stopped.safetensors"))
    assert main(options) == 2
    assert "go on with --resume auto" in capsys.readouterr().err
    assert main([*options, "--resume", str(run_dir.checkpoints()[1])]) == 0
    assert not run_dir.stopped.exists()
    assert main([*options, "--resume", kept, "--workers", "2"]) == 0
    assert "after epoch 1 and 2 iterations" in capsys.readouterr().out


def start(options):
    # as many threads as here: another number rounds otherwise
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "dtokd", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path} after {seconds} s"
        time.sleep(0.01)


def test_kill_9(digits, teacher, tmp_path):
    """A process killed at no chosen moment, and the same command once more."""
    shared = [*distilling(teacher), "--opt", "dtoadamw", "--kd-balance", "dto", "--epochs", "3", "--log-interval", "1"]
    assert main(["train", *common(digits, tmp_path / "a"), *shared, "--experiment", "x"]) == 0
    command = ["train", *common(digits, tmp_path / "b"), *shared, "--experiment", "x", "--resume", "auto"]
    process = start(command)
    wait_for(tmp_path / "b" / "x" / "checkpoints" / "epoch-0001.safetensors")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert main(command) == 0
    same_results(tmp_path / "a" / "x", tmp_path / "b" / "x")


def children_of(pid):
    """Numbers of the processes that it has started and that live."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(number) for number in found]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found in Linux's /proc")
def test_kill_9_leaves_no_workers(digits, tmp_path):
    """They end with the process that started them, also while they wait for room in the pipe to it."""
    options = ["--epochs", "200", "--workers", "4", "-b", "2", "--val-split", "", "--experiment", "x"]
    process = start(["train", *common(digits, tmp_path), *options])
    wait_for(tmp_path / "x" / "checkpoints" / "epoch-0001.safetensors")
    end = time.monotonic() + 60
    while len(workers := children_of(process.pid)) < 4:
        assert time.monotonic() < end
    time.sleep(0.1)  # until they have been asked for batches
    os.kill(process.pid, signal.SIGSTOP)
    assert workers == children_of(process.pid)
    time.sleep(3)  # now the pipe is full
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 10
    while left := [pid for pid in workers if alive(pid)]:
        if time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() <= end, f"{len(left)} of 4 workers live on"
        time.sleep(0.1)
    assert process.stdout.read() is not None  # a pipe as in `dtokd train | tee log` comes to its end
    process.stdout.close()


def test_ctrl_c(digits, teacher, tmp_path):
    """As a terminal sends it, to all processes: exit code 130, a line that says how to go on, a checkpoint there."""
    command = ["train", *common(digits, tmp_path), "--experiment", "x", "--epochs", "200", "--workers", "1"]
    process = start(command)
    wait_for(tmp_path / "x" / "checkpoints" / "epoch-0000.safetensors")
    os.killpg(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "--resume auto goes on" in told
    assert RunDir(tmp_path / "x").checkpoints()


def test_the_same_command_finds_its_run(digits, tmp_path, capsys):
    command = ["train", *common(digits, tmp_path)]
    assert main([*command, "--epochs", "1"]) == 0
    assert main([*command, "--epochs", "1"]) == 2
    assert "go on with --resume auto" in capsys.readouterr().err
    assert main([*command, "--epochs", "1", "--resume", "auto"]) == 0
    assert len(list(tmp_path.iterdir())) == 1
    assert main([*command, "--epochs", "1", "--seed", "43"]) == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_checkpoints_kept(digits, tmp_path):
    """--checkpoint-hist 2, and the best besides."""
    options = [*common(digits, tmp_path), "--experiment", "x", "--epochs", "5", "--checkpoint-hist", "2", "--lr", "0"]
    assert main(["train", *options]) == 0
    best = load_checkpoint(RunDir(tmp_path / "x").checkpoints()[5])["best"]["epoch"] + 1
    assert list(RunDir(tmp_path / "x").checkpoints()) == sorted({int(best), 4, 5})


def test_what_a_killed_run_has_left_is_removed(digits, tmp_path):
    """Files that were being written; others stay."""
    options = ["train", *common(digits, tmp_path), "--experiment", "x", "--resume", "auto"]
    assert main([*options, "--epochs", "1"]) == 0
    folder = tmp_path / "x"
    left = [folder / ".summary.csv.123.tmp", folder / "checkpoints" / ".epoch-0002.safetensors.4567.tmp"]
    other = folder / ".mine.tmp"
    for path in (*left, other):
        path.write_bytes(b"half")
    assert main([*options, "--epochs", "2"]) == 0
    assert not any(path.exists() for path in left)
    assert other.exists()


def test_full_disk(digits, tmp_path, monkeypatch, capsys):
    """The write of the second epoch's checkpoint fails half-way: an error, and all that was there still is."""
    options = ["train", *common(digits, tmp_path), "--experiment", "x"]
    sync, folder = os.fsync, tmp_path / "x" / "checkpoints"

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}").rpartition("/")[2].startswith(".epoch-0002"):
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    assert main(options) == 2
    assert "epoch-0002.safetensors cannot be written: No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == ["epoch-0000.safetensors", "epoch-0001.safetensors"]
    load_checkpoint(folder / "epoch-0001.safetensors")
    assert main([*options, "--resume", "auto"]) == 0


@pytest.mark.parametrize("dies", [True, False])
def test_a_report_that_fails_hides_no_error(digits, tmp_path, monkeypatch, capsys, dies):
    """The error of the run is the one that is told; a run that has none ends well, and the report is made later."""

    def full(folder):
        raise OSError(28, "No space left on device")

    options = ["train", *common(digits, tmp_path), "--experiment", "x", "--epochs", "2"]
    with monkeypatch.context() as patch:
        patch.setattr("dtokd.train.fit.write_report", full)
        if dies:
            die_at(patch, 6)
            with pytest.raises(Died):
                main(options)
        else:
            assert main(options) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "report.html was not written: [Errno 28] No space left on device" in told
    assert main(["report", str(tmp_path / "x")]) == 0


def test_checkpoint_of_another_model(digits, teacher, tmp_path, capsys):
    assert main(["train", *common(digits, tmp_path), "--experiment", "x", "--epochs", "1"]) == 0
    path = str(tmp_path / "x" / "checkpoints" / "epoch-0001.safetensors")
    options = ["train", *common(digits, tmp_path), "--experiment", "y", "--resume", path]
    assert main([*options, "--model", "test_vit"]) == 2
    assert "is of another model (test_resnet; this run trains test_vit)" in capsys.readouterr().err
    assert main([*options, "--opt", "dtoadamw", "--kd-balance", "famo", *distilling(teacher)]) == 2
    assert "was written with --opt sgd, this run has --opt dtoadamw" in capsys.readouterr().err
    damaged = shutil.copy(path, tmp_path / "damaged.safetensors")
    os.truncate(damaged, 1000)
    assert main([*options[:-1], str(damaged)]) == 2
    assert "is damaged or no checkpoint" in capsys.readouterr().err
    assert main([*options[:-1], str(tmp_path / "x" / "student.safetensors")]) == 2
    assert "holds weights, but no state of a run" in capsys.readouterr().err


def test_state_of_all_kinds(tmp_path):
    shared = torch.arange(3.0)
    state = {
        "a": [1, 2.5, None, True, "x", (1, (2.0, shared))],
        3: {"b": shared, "inf": float("inf"), "third": 1 / 3},
        "view": shared[1:],
        "bf16": torch.ones(2, dtype=torch.bfloat16),
        "empty": [],
    }
    save_checkpoint(tmp_path / "a.safetensors", state)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert loaded["a"][:5] == state["a"][:5]
    assert loaded["a"][5][0] == 1
    assert isinstance(loaded["a"][5], tuple)
    assert torch.equal(loaded[3]["b"], shared)
    assert (loaded[3]["inf"], loaded[3]["third"]) == (float("inf"), 1 / 3)
    assert torch.equal(loaded["view"], shared[1:])
    assert torch.equal(loaded["bf16"], state["bf16"])
    with pytest.raises(TypeError, match="x is a set"):
        save_checkpoint(tmp_path / "b.safetensors", {"x": {1}})
    assert not (tmp_path / "b.safetensors").exists()
    with pytest.raises(UsageError, match="there is no file"):
        load_checkpoint(tmp_path / "b.safetensors")
