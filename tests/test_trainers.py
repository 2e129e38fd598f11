"""The examples' trainers against plain loops: the same parameters and the same reported norms after some steps."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

import dtokd_kernels as dk
from dtokd_kernels.sources import Feature
from dtokd_kernels.weighting import Share

EXAMPLES = Path(__file__).parents[1] / "examples"
#: Trainers warn of much; a gradient set that nobody has cleared is an error.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:DTO")]
SAMPLES, BATCH, EPOCHS, CLIP, LR = 40, 8, 2, 0.1, 1e-2  # five micro-batches: the last step of an epoch has one


def example(name):
    """An example as a module."""
    path = EXAMPLES / f"{name}_kd.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 6, generator=generator)
    return inputs, torch.randint(4, (SAMPLES,), generator=generator)


class Net(nn.Module):
    """Its forward takes anything, as those of Hugging Face's models."""

    def __init__(self, seed, width):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4))

    def forward(self, inputs, **_):
        return self.body(inputs)


def student():
    return Net(0, 8)


def teacher():
    return Net(7, 16).eval().requires_grad_(False)


def shares():
    return dk.BalancedLoss(Share({"task": 0.3, "distill": 0.7}, beta=0.9), gram=Feature())


def plain(
    losses_of, backward, model, optimizer, accumulate=2, precision=None, divide_by_all=False, teach_in_autocast=False
):
    """A loop that one can see through.

    Args:
        backward: gives losses, logits and the micro-batch's share to whatever computes gradients.
        divide_by_all: whether the last, shorter step of an epoch divides by `accumulate` as well.
        teach_in_autocast: whether the teacher runs in the student's precision.

    Returns:
        The norms of the gradients before clipping, one for each step.
    """
    taught, norms = teacher(), []
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
                optimizer.step()
                norms.append(optimizer.balance.norm.item())
            else:
                norms.append(clip_grad_norm_(model.parameters(), CLIP).item())
                optimizer.step()
            optimizer.zero_grad()
    return norms


def assert_same(actual, expected, allowed=0.0):
    for (name, p), q in zip(actual.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=allowed, atol=allowed, msg=lambda text, name=name: f"{name}: {text}")
        assert p.grad is None


def one_loss(balanced):
    return lambda losses, logits, share: (balanced(losses, features=logits) * share).backward()


# ---- Hugging Face's Trainer ------------------------------------------------------------------------


def trainer_of(tmp_path, kind, accumulate=2, callbacks=(), **options):
    transformers = pytest.importorskip("transformers")
    module = example("transformers")

    class InOrder(kind or module.DistillationTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    settings = {
        "num_train_epochs": EPOCHS,
        "save_strategy": "no",
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": LR,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    arguments = transformers.TrainingArguments(str(tmp_path), **{**settings, **options})
    more = {} if kind else {"teacher": teacher(), "balanced": shares()}
    points = module.Points(*data())
    made = InOrder(student(), arguments, train_dataset=points, eval_dataset=points, callbacks=list(callbacks), **more)
    return module, made


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_hugging_face(tmp_path, accumulate, precision):
    """Also the clipping, the norm in the log, and the division of a loss whose model takes any argument."""
    module, trainer = trainer_of(tmp_path, None, accumulate, bf16=precision is not None)
    trainer.train()
    expected = student()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=LR, fused=True, weight_decay=0.0)
    norms = plain(module.losses_of, one_loss(shares()), expected, optimizer, accumulate, precision)
    assert min(norms) > CLIP
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-6)
    assert_same(trainer.model, expected, 1e-7)


def test_hugging_face_evaluates_and_resumes(tmp_path):
    """Evaluation is the sum of the losses; a run that goes on from a checkpoint has the averages of the balance."""
    module, whole = trainer_of(tmp_path / "whole", None, eval_strategy="steps", eval_steps=2)
    whole.train()
    assert len(logged(whole, "eval_loss")) == 3
    _, cut = trainer_of(tmp_path / "cut", None, max_steps=4, save_strategy="steps", save_steps=4)
    cut.train()
    _, resumed = trainer_of(tmp_path / "cut", None)
    resumed.train(resume_from_checkpoint=True)
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
    with torch.no_grad():
        inputs, labels = data()
        losses = module.losses_of(whole.model(inputs), whole.teacher(inputs), labels)
    assert whole.evaluate()["eval_loss"] == pytest.approx(float(sum(losses.values())), rel=1e-6)


# ---- Accelerate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    module = example("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    model, balanced, taught = student(), shares(), teacher()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    loader = DataLoader(TensorDataset(*data()), batch_size=BATCH)
    accelerator.register_for_checkpointing(balanced)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    norms = []
    for _ in range(EPOCHS):
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                logits = model(inputs)
                losses = module.losses_of(logits, taught(inputs), labels)
                accelerator.backward(balanced(losses, features=logits, scaler=accelerator.scaler))
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), CLIP).item())
                optimizer.step()
                optimizer.zero_grad()
    expected = student()
    reference = torch.optim.AdamW(expected.parameters(), lr=LR)
    dtype = torch.bfloat16 if precision == "bf16" else None
    found = plain(module.losses_of, one_loss(shares()), expected, reference, precision=dtype, divide_by_all=True)
    assert norms == pytest.approx(found, rel=1e-6)
    assert_same(accelerator.unwrap_model(model), expected, 1e-7)

    accelerator.save_state(tmp_path)
    memory = balanced.state_dict()["weighting"]["norms"].clone()
    balanced.load_state_dict({})
    assert balanced.state_dict() == {}
    accelerator.load_state(tmp_path)
    assert torch.equal(balanced.state_dict()["weighting"]["norms"], memory)


# ---- Lightning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=["float32", "bf16", "fp16"])
def test_lightning(precision, accumulate):
    """In float16 with a GradScaler, as on a GPU: on a CPU Lightning would take bfloat16 in its place."""
    lightning = pytest.importorskip("lightning")
    module = example("lightning")
    norms = []

    class Observed(module.Distillation):
        def configure_optimizers(self):
            return dk.DTOAdamW(self.student.parameters(), lr=LR)

        def on_train_batch_end(self, *_):
            super().on_train_batch_end()
            norm = self.optimizers(use_pl_optimizer=False).balance
            if norm is not None and len(norms) < self.trainer.global_step:
                norms.append(norm.norm.item())
                assert self.trainer.callback_metrics["grad_norm"].item() == pytest.approx(norms[-1])

    options = {"precision": "bf16-mixed"} if precision is torch.bfloat16 else {}
    if precision is torch.float16:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        options = {"plugins": lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)}
    distillation = Observed(teacher(), student())
    lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(distillation, DataLoader(TensorDataset(*data()), batch_size=BATCH))
    expected = student()
    optimizer = dk.DTOAdamW(expected.parameters(), lr=LR, max_norm=CLIP)

    def backward(losses, logits, share):
        optimizer.backward(losses, share=share)

    def losses_of(logits, target, labels):
        return example("accelerate").losses_of(logits, target, labels)

    found = plain(losses_of, backward, expected, optimizer, accumulate, precision, divide_by_all=True, teach_in_autocast=True)
    assert norms == pytest.approx(found, rel=1e-5)
    assert min(found) > CLIP
    # float16 rounds the scaled gradients at other places
    assert_same(distillation.student, expected, 1e-3 if precision is torch.float16 else 1e-6)


def test_lightning_clips_by_the_norm_alone():
    pytest.importorskip("lightning")
    module = example("lightning").Distillation(teacher(), student())
    with pytest.raises(ValueError, match="pass gradient_clip_algorithm='norm'"):
        module.configure_gradient_clipping(None, 1.0, "value")
