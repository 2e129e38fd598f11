"""`dtokd train` and `detect` on several ranks: one process on the whole batch, the same bits, written once, resumed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dtokd.cli import main
from dtokd.train.checkpoint import load_checkpoint
from dtokd.train.rundir import RunDir
from safetensors.torch import save_file

from .coco import VIDT, write_coco
from .coco import common as coco_options
from .digits import common, distilling, write_digits
from .ranks import training
from .ranks.pool import Pool, free_port
from .test_detect import dense, vidt
from .test_detect_run import distilling as taught
from .test_train_resume import TIMES, same_results
from .written import rows

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


class Alone:
    """This process, as torchrun starts a single one."""

    def run(self, work, *args):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("RANK", "LOCAL_RANK"):
                patch.setenv(name, "0")
            for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                patch.setenv(name, "1")
            patch.setenv("MASTER_ADDR", "127.0.0.1")
            patch.setenv("MASTER_PORT", str(free_port()))
            try:
                return [work(0, 1, *args)]
            finally:
                if dist.is_initialized():  # after an error
                    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pools():
    pool = Pool(2)
    yield {1: Alone(), 2: pool}
    pool.close()


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Of which two ranks cannot have equal numbers."""
    return write_coco(tmp_path_factory.mktemp("coco") / "data", train=15, val=5)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Of which two ranks cannot have equal numbers for evaluation."""
    return write_digits(tmp_path_factory.mktemp("uneven"), validation=29)


def same_weights(answers):
    first = answers[0][2]
    assert first
    for _, _, weights, _ in answers[1:]:
        assert weights.keys() == first.keys()
        assert [name for name in first if not torch.equal(first[name], weights[name])] == []


def succeeded(answers):
    assert [code for code, *_ in answers] == [0] * len(answers), "\n".join(said for _, said, *_ in answers)
    return answers


def numbers(path):
    return [{key: float(value) for key, value in row.items()} for row in rows(path)]


WAYS = {
    "sum": "--opt sgd --clip-grad 1",
    "dto": "--opt dtosgd --kd-balance dto --clip-grad 1",
    "accumulated": "--opt dtosgd --kd-balance dto --grad-accum-steps 2 --kd-distill-type feature logit",
    "sharded": "--opt dtosgd --kd-balance amortized --kd-shard --grad-accum-steps 2",
    "filled": "--opt lamb --kd-balance dto --clip-grad 1 --grad-accum-steps 2",
    "plain_accumulated": "--opt sgd --grad-accum-steps 2 --model-ema --model-ema-decay 0.5 --kd-distill-type logit crd "
    "pseudo-class --kd-queue-size 32",
    "while_better": "--opt dtosgd --kd-balance whilebetter --kd-held-out 0.25 --kd-held-out-every 2",
    "held_out": "--opt sgd --kd-balance heldout --kd-held-out 0.25 --kd-held-out-every 2",
}


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_with_half_the_batch_are_one_with_the_whole(pools, uneven, teacher, tmp_path, way):
    """A student without batch normalization and dropout, images without augmentation: equal but for rounding."""
    shared = [*distilling(teacher), *WAYS[way].split(), "--model", "test_vit", "--no-aug", "--experiment", "x"]
    found = {}
    for size, batch in ((1, 16), (2, 8)):
        options = ["train", *common(uneven, tmp_path / str(size)), *shared, "-b", str(batch), "--log-interval", "1"]
        found[size] = succeeded(pools[size].run(training.train, options))
    same_weights(found[2])
    for name, value in found[1][0][2].items():
        if name.endswith("pseudo_class.rows"):  # the same features in another order
            value, found[2][0][2][name] = (rows[rows[:, 0].argsort()] for rows in (value, found[2][0][2][name]))
        torch.testing.assert_close(found[2][0][2][name], value, rtol=1e-4, atol=1e-5)
    alone, together = (tmp_path / str(size) / "x" for size in (1, 2))
    compared = ["summary.csv", "steps.csv"] if "--kd-balance" in WAYS[way] else ["summary.csv"]
    for name in compared:
        for one, two in zip(numbers(alone / name), numbers(together / name), strict=True):
            [row.pop(key, None) for row in (one, two) for key in TIMES]
            assert two == pytest.approx(one, rel=1e-3, abs=1e-5, nan_ok=True)


STOPPED = {
    "sum": "--opt sgd --mixup 0.2 --drop 0.2 --model-ema --reprob 0.5 --dist-bn broadcast --kd-distill-type crd "
    "pseudo-class feature --kd-queue-size 24 --kd-feature-norm phi-s",
    "dto": "--opt dtoadamw --kd-balance dto --kd-balance-gram ema:0.9 --drop 0.2 --amp --no-ddp-bb --dist-bn ",
    "filled": "--opt lookahead_lion --kd-balance amortized --drop 0.2",
    "sharded": "--opt dtoadamw --kd-balance dto --kd-shard --aa rand-m5 --model-ema --kd-distill-type feature logit",
}


@pytest.mark.parametrize("way", STOPPED)
def test_stopped_on_one_rank_and_resumed_on_all(pools, digits, teacher, tmp_path, way):
    """The second rank gets the signal; all end one step later, and go on with the bits of an undisturbed run."""
    options = ["train", *common(digits, tmp_path / "a"), *distilling(teacher), *STOPPED[way].split(" ")]
    options += ["--experiment", "x", "-b", "4", "--log-interval", "3", "--resume", "auto"]
    undisturbed = succeeded(pools[2].run(training.train, options))
    if way != "dto":  # there the statistics of batch normalization are each rank's own
        same_weights(undisturbed)
    options[options.index(str(tmp_path / "a"))] = str(tmp_path / "b")
    for step in (2, 7):  # in the first epoch of eight steps, and counted on in the next one
        answers = pools[2].run(training.train, options, {1: step})
        assert [code for code, *_ in answers] == [143, 143]
        assert "the same command with --resume auto goes on" in answers[0][1]
        assert answers[1][1] == ""
    assert load_checkpoint(RunDir(tmp_path / "b" / "x").stopped)["batches"] in (2, 3)
    resumed = succeeded(pools[2].run(training.train, options))
    for before, after in zip(undisturbed, resumed, strict=True):
        assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])
        assert before[3] == after[3]
    same_results(tmp_path / "a" / "x", tmp_path / "b" / "x")


@pytest.mark.parametrize("shard", [[], ["--kd-shard"]])
def test_nan_on_one_rank_skips_the_step_on_all(pools, digits, teacher, tmp_path, shard):
    options = ["train", *common(digits, tmp_path), *distilling(teacher), *shard, "--opt", "dtoadamw"]
    options += ["--kd-balance", "dto", "--experiment", "x", "--epochs", "1", "-b", "8"]
    answers = succeeded(pools[2].run(training.train, options, None, {1: 2}))
    same_weights(answers)
    assert all(value.isfinite().all() for value in answers[0][2].values())
    assert [row["skipped"] for row in numbers(tmp_path / "x" / "steps.csv")] == [0, 1, 0, 0]


def test_another_number_of_ranks_goes_on_with_the_weights(pools, digits, teacher, tmp_path):
    """Sharded on two ranks, then one process without ranks; in the middle of an epoch it must be as many."""
    options = ["train", *common(digits, tmp_path), *distilling(teacher), "--opt", "dtoadamw", "--kd-balance", "dto"]
    options += ["--experiment", "x", "-b", "8"]
    assert [code for code, *_ in pools[2].run(training.train, [*options, "--kd-shard"], {0: 6})] == [143, 143]
    saved = RunDir(tmp_path / "x")
    answers = pools[1].run(training.train, [*options, "--resume", "auto"])
    assert answers[0][0] == 2
    assert "in the middle of an epoch of 2 processes, this run has 1" in answers[0][1]
    answers = pools[1].run(training.train, [*options, "--resume", str(saved.checkpoints()[1]), "--epochs", "3"])
    assert answers[0][0] == 0
    assert "written by 2 processes, this run has 1" in answers[0][1]
    moments = load_checkpoint(saved.checkpoints()[3])["stepper"]["optimizer"]["state"].values()
    assert {int(held["step"]) for held in moments} == {4 + 16}
    assert max(held["exp_avg"].dim() for held in moments) == 4


def test_rank_that_dies_and_torchrun_goes_on(pools, digits, teacher, tmp_path):
    """Killed in the second of two epochs; the other one ends with an error, and the second life has the same end."""
    shared = [*distilling(teacher), "--opt", "dtosgd", "--kd-balance", "dto", "--experiment", "x", "-b", "8"]
    succeeded(pools[2].run(training.train, ["train", *common(digits, tmp_path / "a"), *shared]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["-m", "tests.ranks.training", "train", *common(digits, tmp_path / "b"), *shared, "--resume", "auto"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python")))}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("of 2 processes") == 2
    assert "going on after epoch 1 from" in ran.stdout
    same_results(tmp_path / "a" / "x", tmp_path / "b" / "x")


def test_ranks_share_the_teachers_outputs(pools, digits, teacher, tmp_path):
    """In the second epoch a rank has the images of the other one; the teacher sees each once, and then none."""
    options = ["train", *common(digits, tmp_path), *distilling(teacher), "--opt", "dtosgd", "--kd-balance", "dto"]
    options += ["--kd-cache-teacher", str(tmp_path / "cache"), "--mixup", "0.2", "--reprob", "0.5"]
    first = succeeded(pools[2].run(training.train, [*options, "-b", "8", "--experiment", "first"]))
    assert "0 of 64 rows are there" in first[0][1]
    again = succeeded(pools[2].run(training.train, [*options, "-b", "8", "--experiment", "again"]))
    assert "64 of 64 rows are there; the teacher is not needed" in again[0][1]
    same_weights([*first, *again])
    # one process with other batches finds them too
    alone = succeeded(pools[1].run(training.train, [*options, "-b", "32", "--epochs", "1", "--experiment", "alone"]))
    assert "64 of 64 rows are there; the teacher is not needed" in alone[0][1]


DETECTING = {
    "fcos": "--opt dtoadamw --kd-balance dto --kd-shard --clip-grad 1 --model-ema --crop --color-jitter 0.3",
    "vidt": "--opt lion --kd-balance whilebetter --kd-held-out 0.2 --kd-held-out-every 2 --kd-feature-norm standardize",
}
#: In the second epoch, of four steps and, without the held-out images, three.
DETECTING_STOPPED = {"fcos": 6, "vidt": 4}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", DETECTING)
def test_detectors_stopped_on_one_rank_and_resumed_on_all(pools, coco, tmp_path, capsys, kind):
    """As classifiers; what is found in an epoch has the AP of one process."""
    teacher = tmp_path / "teacher.safetensors"
    model = dense(seed=7) if kind == "fcos" else vidt(seed=7)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, teacher)
    options = ["detect", *coco_options(coco, tmp_path / "a"), *taught(kind, teacher)]
    options += [*DETECTING[kind].split(), "--experiment", "x", "--pictures", "2"]
    options += ["--log-interval", "1", "--resume", "auto"]
    undisturbed = succeeded(pools[2].run(training.train, options))
    same_weights(undisturbed)
    assert len(list((tmp_path / "a" / "x" / "pictures").iterdir())) == 2
    options[options.index(str(tmp_path / "a"))] = str(tmp_path / "b")
    answers = pools[2].run(training.train, options, {1: DETECTING_STOPPED[kind]})
    assert [code for code, *_ in answers] == [143, 143]
    assert load_checkpoint(RunDir(tmp_path / "b" / "x").stopped)["batches"] in (1, 2, 3)
    resumed = succeeded(pools[2].run(training.train, options))
    for before, after in zip(undisturbed, resumed, strict=True):
        assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])
        assert before[3] == after[3]
    same_results(tmp_path / "a" / "x", tmp_path / "b" / "x")
    capsys.readouterr()
    last = tmp_path / "a" / "x" / "student-last.safetensors"
    assert main(["eval", str(tmp_path / "a" / "x"), "--checkpoint", str(last)]) == 0
    alone = json.loads(capsys.readouterr().out)
    prefix = "eval_ema_" if kind == "fcos" else "eval_"
    together = numbers(tmp_path / "a" / "x" / "summary.csv")[-1]
    found = {name.removeprefix(prefix): value for name, value in together.items() if name.startswith(prefix)}
    wanted = {name: math.nan if alone[name] is None else alone[name] for name in found}
    assert found == pytest.approx(wanted, rel=0, abs=0, nan_ok=True)


def test_detectors_without_balance_on_two_ranks(pools, coco, tmp_path):
    """Plain DistributedDataParallel, of the seeds' one student; all images are seen in an epoch."""
    options = ["detect", *coco_options(coco, tmp_path), *VIDT, "--experiment", "x", "--pictures", "0", "-b", "3"]
    same_weights(succeeded(pools[2].run(training.train, options)))


def test_detectors_share_the_teachers_predictions(pools, coco, tmp_path):
    """Each rank stores its part of an epoch; the next run needs no teacher."""
    teacher = tmp_path / "teacher.safetensors"
    save_file({name: value.clone() for name, value in dense(seed=7).state_dict().items()}, teacher)
    options = ["detect", *coco_options(coco, tmp_path), *taught("fcos", teacher), "--pictures", "0", "--square"]
    options += ["--kd-distill-type", "prediction", "--kd-cache-teacher", str(tmp_path / "cache"), "--val-split", ""]
    first = succeeded(pools[2].run(training.train, [*options, "--experiment", "first"]))
    assert "0 of 12 rows are there" in first[0][1]
    again = succeeded(pools[2].run(training.train, [*options, "--experiment", "again"]))
    assert "12 of 12 rows are there; the teacher is not needed" in again[0][1]
    same_weights([*first, *again])


def test_detections_of_all_ranks_are_judged_as_those_of_one(pools, coco):
    alone = training.judged(0, 1, coco)
    assert 0.05 < alone["ap"] < 0.95
    for found in pools[2].run(training.judged, coco):
        assert found == pytest.approx(alone, rel=0, abs=0, nan_ok=True)


REFUSED = {
    "--kd-shard: --opt adamw": "--opt adamw --kd-shard",
    "--kd-shard: attach: gram='lag'": "--opt dtoadamw --kd-balance dto --kd-balance-gram lag --kd-shard",
    "is not contiguous": "--opt dtoadamw --kd-balance dto --channels-last --kd-shard",
    "--sync-bn: torch has it on GPUs only": "--opt adamw --sync-bn",
    "of which each rank has a part; pass a smaller one": "--opt adamw -b 33",
    "holds a run of 1 epochs; go on with --resume auto": "--opt adamw",  # found by the first rank alone
}


@pytest.mark.parametrize("expected", REFUSED)
def test_what_does_not_go_over_ranks_is_an_error_that_is_told_once(pools, digits, teacher, tmp_path, expected):
    options = ["train", *common(digits, tmp_path), *distilling(teacher), *REFUSED[expected].split()]
    if "holds a run" in expected:
        assert main([*options, "--experiment", "x", "--epochs", "1"]) == 0
    answers = pools[2].run(training.train, [*options, "--experiment", "x"])
    assert [code for code, *_ in answers] == [2, 2]
    assert expected in answers[0][1]
    assert answers[1][1] == ""


def test_one_process_has_nothing_to_shard(digits, teacher, tmp_path, capsys):
    options = ["train", *common(digits, tmp_path), *distilling(teacher), "--kd-balance", "dto", "--opt", "dtosgd"]
    assert main([*options, "--kd-shard"]) == 2
    assert "start several with torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_other_commands_are_for_one_process(monkeypatch, capsys, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == (
        ""
        if rank == "1"
        else "dtokd doctor: error: torchrun has started 2 processes, which only dtokd train and dtokd detect "
        "need; start it without torchrun\n"
    )
