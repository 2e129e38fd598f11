"""The examples' trainers against plain loops: the same parameters and the same reported norms after some steps."""

import contextlib

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset

import dtokd_kernels as dk

from . import trainers
from .ranks.pool import Pool
from .trainers import BATCH, CLIP, EPOCHS, LR, data, example, logged, shares, student, teacher

#: Trainers warn of much; a gradient set that nobody has cleared is an error.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:DTO")]


def plain(
    backward,
    optimizer,
    model,
    accumulate=2,
    precision=None,
    divide_by_all=False,
    teach_in_autocast=False,
    scaler=None,
):
    """A loop that one can see through.

    Args:
        backward: gives losses, logits and the micro-batch's share to whatever computes gradients.
        divide_by_all: whether the last, shorter step of an epoch divides by `accumulate` as well.
        teach_in_autocast: whether the teacher runs in the student's precision.

    Returns:
        The norms of the gradients before clipping, one for each step.
    """
    losses_of, taught, norms = example("pytorch").losses_of, teacher(), []
    for _ in range(EPOCHS):
        batches = list(DataLoader(TensorDataset(*data()), batch_size=BATCH))
        for begin in range(0, len(batches), accumulate):
            window = batches[begin : begin + accumulate]
            for inputs, labels in window:
                with torch.autocast("cpu", precision) if precision else contextlib.nullcontext():
                    logits = model(inputs).float()
                    target = taught(inputs).float() if teach_in_autocast else None
                losses = losses_of(logits, taught(inputs) if target is None else target, labels)
                backward(losses, logits, 1 / (accumulate if divide_by_all else len(window)))
            if isinstance(optimizer, dk.DTOAdamW):
                scaler.step(optimizer)
                scaler.update()
                norms.append(optimizer.balance.norm.item())
            else:
                norms.append(clip_grad_norm_(model.parameters(), CLIP).item())
                optimizer.step()
            optimizer.zero_grad()
    assert min(norms) > CLIP
    return norms


def plain_one_loss(accumulate=2, fused=False, **options):
    """The student and the norms of a loop with AdamW on one loss."""
    model, balanced = student(), shares()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=fused, weight_decay=0.0 if fused else 0.01)

    def backward(losses, logits, share):
        (balanced(losses, features=logits) * share).backward()

    return model, plain(backward, optimizer, model, accumulate, **options)


def plain_exact(accumulate=2):
    """The student and the norms of a loop with AdamW on gradients that `dk.backward` has balanced."""
    model = student()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True, weight_decay=0.0)

    def backward(losses, logits, share):
        dk.backward(losses, model.parameters(), share=share)

    return model, plain(backward, optimizer, model, accumulate)


def plain_sets(accumulate=2, precision=None):
    """The student and the norms of a loop with DTOAdamW; in float16 with a GradScaler."""
    model, scaler = student(), fp16_scaler(precision is torch.float16)
    optimizer = dk.DTOAdamW(model.parameters(), lr=LR, max_norm=CLIP)

    def backward(losses, logits, share):
        optimizer.backward(losses, share=share, scaler=scaler)

    return model, plain(backward, optimizer, model, accumulate, precision, True, True, scaler)


def fp16_scaler(enabled):
    return torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)


def assert_same(actual, expected):
    for p, q in zip(actual, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert p.grad is None


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_hugging_face(tmp_path, accumulate, precision):
    """Also the clipping, the norm in the log, and the division of a loss whose model takes any argument."""
    pytest.importorskip("transformers")
    _, trainer = trainers.hugging_face(tmp_path, accumulate, bf16=precision is not None)
    trainer.train()
    expected, norms = plain_one_loss(accumulate, fused=True, precision=precision)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-6)
    assert_same(trainer.model.parameters(), expected.parameters())


def test_hugging_face_evaluates_and_resumes(tmp_path):
    """Evaluation is the sum of the losses; a run that goes on from a checkpoint has the averages of the balance."""
    pytest.importorskip("transformers")
    module, whole = trainers.hugging_face(tmp_path / "whole", eval_strategy="steps", eval_steps=2)
    whole.train()
    assert len(logged(whole, "eval_loss")) == 3
    _, cut = trainers.hugging_face(tmp_path / "cut", max_steps=4, save_strategy="steps", save_steps=4)
    cut.train()
    _, resumed = trainers.hugging_face(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
    with torch.no_grad():
        inputs, labels = data()
        losses = module.losses_of(whole.model(inputs), whole.teacher(inputs), labels)
    assert whole.evaluate()["eval_loss"] == pytest.approx(float(sum(losses.values())), rel=1e-6)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision, tmp_path):
    pytest.importorskip("accelerate")
    accelerator, model, balanced, norms = trainers.accelerated(precision)
    dtype = torch.bfloat16 if precision == "bf16" else None
    expected, found = plain_one_loss(precision=dtype, divide_by_all=True)
    assert norms == pytest.approx(found, rel=1e-6)
    assert_same(model.parameters(), expected.parameters())

    accelerator.save_state(tmp_path)
    memory = balanced.state_dict()["weighting"]["norms"].clone()
    balanced.load_state_dict({})
    assert balanced.state_dict() == {}
    accelerator.load_state(tmp_path)
    assert torch.equal(balanced.state_dict()["weighting"]["norms"], memory)


def test_hugging_face_with_exact_gradients(tmp_path):
    """`dk.backward` in `training_step`: K backward passes, and the Trainer's own clipping, log and clearing."""
    pytest.importorskip("transformers")
    _, trainer = trainers.hugging_face(tmp_path, exact=True)
    trainer.train()
    expected, norms = plain_exact()
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-6)
    assert_same(trainer.model.parameters(), expected.parameters())


def test_accelerate_with_gradient_sets():
    pytest.importorskip("accelerate")
    _, model, _, norms = trainers.accelerated(sets=True)
    expected, found = plain_sets()
    assert norms == pytest.approx(found, rel=1e-6)
    assert_same(model.parameters(), expected.parameters())


def test_lightning_with_one_loss():
    pytest.importorskip("lightning")
    model, norms = trainers.fitted(one_loss=True)
    expected, found = plain_one_loss(divide_by_all=True)
    assert norms == pytest.approx(found, rel=1e-6)
    model.zero_grad()  # Lightning clears before the next backward pass
    assert_same(model.parameters(), expected.parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=["float32", "bf16", "fp16"])
def test_lightning(precision, accumulate):
    """In float16 with a GradScaler, as on a GPU: on a CPU Lightning would take bfloat16 in its place."""
    lightning = pytest.importorskip("lightning")
    options = {"precision": "bf16-mixed"} if precision is torch.bfloat16 else {}
    if precision is torch.float16:
        options = {"plugins": lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", fp16_scaler(True))}
    model, norms = trainers.fitted(accumulate, **options)
    expected, found = plain_sets(accumulate, precision=precision)
    assert norms == pytest.approx(found, rel=1e-5)
    assert_same(model.parameters(), expected.parameters())


def test_lightning_clips_by_the_norm_alone():
    pytest.importorskip("lightning")
    module = example("lightning").Distillation(teacher(), student())
    with pytest.raises(ValueError, match="pass gradient_clip_algorithm='norm'"):
        module.configure_gradient_clipping(None, 1.0, "value")


def test_two_processes_are_one_on_the_whole_batch(tmp_path):
    """Each trainer's own DDP, as torchrun starts it."""
    for package in ("lightning", "accelerate", "transformers"):
        pytest.importorskip(package)
    loops = {
        "lightning": plain_sets,
        "accelerate": plain_one_loss,
        "transformers": lambda accumulate: plain_one_loss(accumulate, fused=True),
        "exact": plain_exact,
    }
    pool = Pool(2, 120)
    try:
        answers = {name: pool.run(trainers.on_ranks, name, str(tmp_path)) for name in loops}
    finally:
        pool.close()
    for name, ((first, norms), (second, _)) in answers.items():
        expected, found = loops[name](1)
        assert all(map(torch.equal, first, second)), name
        assert norms == pytest.approx(found, rel=1e-5), name
        for p, q in zip(first, expected.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
