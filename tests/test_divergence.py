"""Losses that are not finite: one batch of them is survived, a run that has diverged ends in one sentence."""

import pytest
import torch
from dtokd.cli import main
from dtokd.errors import Diverged
from dtokd.objectives.logits import Hinton
from dtokd.objectives.task import DistillationTask
from dtokd.train.checkpoint import load_checkpoint
from dtokd.train.divergence import PATIENCE, Losses
from dtokd.train.world import World
from safetensors.torch import load_file

from .coco import FCOS, VIDT
from .coco import common as common_coco
from .digits import common, distilling
from .test_detect import configuration, images, targets
from .written import rows

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, ONE = torch.tensor(torch.nan), torch.tensor(1.0)
BALANCED = ["--kd-balance", "dto", "--opt", "dtoadamw"]


def spoil(monkeypatch, numbers):
    """Make the pixels of these batches NaN, counted from 0 over all epochs of a run."""
    count = [0]

    def spoiled(forward):
        def inner(self, input, *more):
            if count[0] in numbers:
                pixels = input if isinstance(input, torch.Tensor) else input.pixels
                pixels.mul_(torch.nan)
            count[0] += 1
            return forward(self, input, *more)

        return inner

    monkeypatch.setattr(DistillationTask, "forward", spoiled(DistillationTask.forward))


def all_finite(path):
    return all(bool(value.isfinite().all()) for value in load_file(path).values())


@pytest.mark.parametrize(
    "texts",
    [
        "--opt dtoadamw --kd-balance dto",
        "--opt adamw --kd-balance dto",
        "--opt dtoadamw --kd-balance dto --grad-accum-steps 2 --model-ema",
        "--opt dtoadamw --kd-balance amortized",
        "--opt dtoadamw --kd-balance dto --kd-balance-gram every:2",
    ],
)
def test_one_batch_is_survived(digits, teacher, tmp_path, monkeypatch, capsys, texts):
    """Its step is skipped and counted; parameters and BatchNorm's statistics stay finite, and so do the means."""
    spoil(monkeypatch, {1, 6})
    options = [*common(digits, tmp_path), *distilling(teacher), *texts.split(), "--experiment", "x"]
    assert main(["train", *options]) == 0
    told = rows(tmp_path / "x" / "summary.csv")
    assert all(float(row["skip_rate"]) == (0.5 if "accum" in texts else 0.25) for row in told)
    assert all(0 < float(row["train_loss"]) < 100 for row in told)
    assert all(float(row["eval_loss"]) < 100 for row in told)
    assert all_finite(tmp_path / "x" / "student-last.safetensors")
    assert capsys.readouterr().out.count("1 of 4 batches had a loss that is not finite; their steps were skipped") == 2


def test_skipped_step_changes_nothing(digits, teacher, tmp_path, monkeypatch):
    """The parameters after an epoch of one good and then bad batches are those after the good one."""
    options = [*common(digits, tmp_path), *distilling(teacher), *BALANCED, "--epochs", "1"]
    after = {}
    monkeypatch.setattr("dtokd.train.divergence.PATIENCE", 5)
    step = DistillationTask.update_ema

    def watched(self, step=None, forward=step):
        after[step] = {n: p.detach().clone() for n, p in self.get_trainable_module().named_parameters()}
        return forward(self, step=step)

    monkeypatch.setattr(DistillationTask, "update_ema", watched)
    spoil(monkeypatch, {1, 2, 3})
    assert main(["train", *options]) == 0
    assert list(after) == [1, 2, 3, 4]
    assert all(torch.equal(after[1][n], after[4][n]) for n in after[1])


def ends(capsys, command, *texts):
    assert main([command, *texts, "--experiment", "x"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dtokd {command}: error: the run has diverged: in epoch 2, up to iteration ")
    assert error.count("\n") == 1
    assert "start anew with a --lr below" in error
    return error


def finished_epoch_is_whole(run):
    """And nothing else is there."""
    assert [row["epoch"] for row in rows(run / "summary.csv")] == ["0"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "epoch-0000.safetensors",
        "epoch-0001.safetensors",
    ]
    held = load_checkpoint(run / "checkpoints" / "epoch-0001.safetensors")
    assert all(bool(value.isfinite().all()) for value in held["weights"].values())
    assert all_finite(run / "student.safetensors")
    assert (run / "report.html").exists()


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ("--kd-balance dto --opt dtoadamw", "iteration 4, task and kl were not finite for 4 batches in a row"),
        ("--kd-balance none --opt adamw", "task and kl were not finite;"),
    ],
)
def test_classifier_diverges(digits, teacher, tmp_path, monkeypatch, capsys, texts, found):
    spoil(monkeypatch, set(range(4, 8)))
    assert found in ends(capsys, "train", *common(digits, tmp_path), *distilling(teacher), *texts.split())
    finished_epoch_is_whole(tmp_path / "x")


@pytest.mark.parametrize("detector", [FCOS, VIDT], ids=["fcos", "vidt"])
def test_detector_diverges(coco, tmp_path, monkeypatch, capsys, detector):
    """The DETR family's matching takes no NaN, and has a traceback of its own for it."""
    spoil(monkeypatch, {5})
    options = [*common_coco(coco, tmp_path), *detector, "--pictures", "0"]
    assert "task was not finite;" in ends(capsys, "detect", *options)
    finished_epoch_is_whole(tmp_path / "x")


def test_parameters_that_the_last_step_has_spoiled(digits, tmp_path, monkeypatch, capsys):
    """All losses are finite, and a gradient is not: the checkpoint would be of no use."""
    forward, count = DistillationTask.forward, [0]

    def spoiled(self, *batch):
        result = forward(self, *batch)
        count[0] += 1
        if count[0] == 8:
            result["loss"].register_hook(lambda gradient: gradient * torch.nan)
        return result

    monkeypatch.setattr(DistillationTask, "forward", spoiled)
    assert "student.conv1.0.weight was not finite" in ends(capsys, "train", *common(digits, tmp_path), "--opt", "adamw")
    finished_epoch_is_whole(tmp_path / "x")


def test_negative_loss_ends_in_a_sentence(digits, teacher, tmp_path, monkeypatch, capsys):
    """Which names the loss, epoch and iteration."""
    monkeypatch.setattr(Hinton, "loss", lambda self, student, *more: -student.logits.square().mean())
    options = [*common(digits, tmp_path), *distilling(teacher), *BALANCED, "--experiment", "x"]
    assert main(["train", *options]) == 2
    error = capsys.readouterr().err
    place = "--kd-balance dto: epoch 1, iteration 1: DTOAdamW.backward: losses['kl'] is -"
    assert error.startswith(f"dtokd train: error: {place}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "kind", ["detr", "conditional_detr", "dab-detr", "deformable_detr", "rt_detr", "d_fine", "yolos"]
)
def test_detr_family_has_a_loss_of_nan(kind):
    """With a gradient, so that the balance sees it."""
    import transformers
    from dtokd.detect.detectors.hf import HFDetector

    torch.manual_seed(0)
    detector = HFDetector(transformers.AutoModelForObjectDetection.from_config(configuration(kind))).train()
    with torch.no_grad():
        for p in detector.parameters():
            p.mul_(torch.nan)
    loss = detector.observe(images(), targets()).loss
    assert loss.isnan()
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.isnan().any()) for p in detector.parameters())


def test_error_of_the_loss_itself_stays_an_error():
    """Finite predictions and boxes that are none."""
    from .test_detect import vidt

    wrong = targets()
    wrong[0]["boxes"] = wrong[0]["boxes"].flip(1)
    with pytest.raises(ValueError, match="corner"):
        vidt().observe(images(), wrong)


def test_a_learning_rate_that_is_far_too_large(capsys, digits, teacher, tmp_path):
    """As it really happens: also without a balance, where timm trains NaN to the end."""
    argv = ["train", *common(digits, tmp_path), *distilling(teacher), "--opt", "adamw", "--epochs", "3", "--lr", "1e12"]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "the run has diverged" in error
    assert "--lr below 1e+12" in error


def losses_of_batches(*batches, skipped=None, before=None):
    losses = Losses(World(), row=before)
    for value in batches:
        losses.add({"loss": value, "task": ONE, "kl": value}, 2, skipped)
    losses.compute()
    return losses


def test_rule():
    """In a row, over epochs; at least two, at most `PATIENCE`; one is enough where steps are not skipped."""
    first = losses_of_batches(ONE, NAN, NAN)
    assert (first.bad, first.row, first.named) == (2, 2, ["loss", "kl"])
    first.check(0, 3, 3, True, 0.1)
    second = losses_of_batches(torch.tensor(torch.inf), before=first.row_on_device)
    with pytest.raises(
        Diverged, match=r"in epoch 2, up to iteration 1, kl was not finite for 3 batches in a row; .*0\.1"
    ):
        second.check(1, 1, 3, True, 0.1)
    second.check(1, 1, 4, True, 0.1)
    assert losses_of_batches(NAN, ONE).row == 0
    single = losses_of_batches(NAN)
    single.check(0, 1, 1, True, 0.1)
    with pytest.raises(Diverged, match="kl was not finite;"):
        single.check(0, 1, 1, False, 0.1)
    long = losses_of_batches(*[NAN] * (PATIENCE - 1))
    long.check(0, 10**6, 10**6, True, 0.1)


def test_gradients_count():
    """One may be bad where no loss is; then nothing is trained either."""
    losses = losses_of_batches(ONE, ONE, skipped=torch.tensor(True))
    with pytest.raises(Diverged, match="a gradient was not finite for 2 batches in a row"):
        losses.check(0, 2, 2, True, 0.1)
    assert losses.compute() == {"loss": 1.0, "task": 1.0, "kl": 1.0}
