"""Short runs of the examples' trainers, on one process or on several: parameters and reported norms."""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, TensorDataset

import dtokd_kernels as dk

EXAMPLES = Path(__file__).parents[1] / "examples"
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
    rule = dk.weighting.Share({"task": 0.3, "distill": 0.7}, beta=0.9)
    return dk.BalancedLoss(rule, gram=dk.sources.Feature())


def hugging_face(folder, accumulate=2, batch=BATCH, exact=False, **options):
    """The example's Trainer, on samples in order; with its module. `exact` balances K gradients of each micro-batch."""
    import transformers

    module = example("transformers")

    class InOrder(module.DistillationTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    class Exact(InOrder):
        def training_step(self, model, inputs, num_items_in_batch=None):
            """As docs/trainers.md has it."""
            model.train()
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                target = self.teacher(inputs["inputs"])
                losses = module.losses_of(model(inputs["inputs"]), target, inputs["labels"])
            parts = self.current_gradient_accumulation_steps
            dk.backward(losses, model.parameters(), share=1 / parts, scaler=self.accelerator.scaler)
            return sum(losses.values()).detach() / parts

    settings = {
        "num_train_epochs": EPOCHS,
        "save_strategy": "no",
        "per_device_train_batch_size": batch,
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
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **options})
    points = module.Points(*data())
    more = {"teacher": teacher(), "balanced": shares()}
    kind = Exact if exact else InOrder
    return module, kind(student(), arguments, train_dataset=points, eval_dataset=points, **more)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def accelerated(precision="no", batch=BATCH, accumulate=2, sets=False):
    """A loop with Accelerate; the accelerator, the student, the balance and the norms. `sets`: with DTOAdamW."""
    import accelerate

    module = example("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    model, balanced, taught, norms = student(), shares(), teacher(), []
    optimizer = (
        dk.DTOAdamW(model.parameters(), lr=LR, max_norm=CLIP) if sets else torch.optim.AdamW(model.parameters(), lr=LR)
    )
    loader = DataLoader(TensorDataset(*data()), batch_size=batch)
    accelerator.register_for_checkpointing(balanced)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(EPOCHS):
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                logits = model(inputs)
                losses = module.losses_of(logits, taught(inputs), labels)
                if sets:
                    optimizer.optimizer.backward(losses, share=1 / accumulate, scaler=accelerator.scaler)
                else:
                    accelerator.backward(balanced(losses, features=logits, scaler=accelerator.scaler))
                if accelerator.sync_gradients and not sets:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), CLIP).item())
                optimizer.step()
                if accelerator.sync_gradients and sets:
                    norms.append(optimizer.optimizer.balance.norm.item())
                optimizer.zero_grad()
    return accelerator, accelerator.unwrap_model(model), balanced, norms


def fitted(accumulate=2, batch=BATCH, one_loss=False, **options):
    """Lightning's Trainer on the example's module; the student, and the norms that it has logged.

    With `one_loss` the module takes a `BalancedLoss` and AdamW instead, and overrides no hook.
    """
    import lightning

    norms = []

    class OneLoss(lightning.LightningModule):
        def __init__(self, teacher, student):
            super().__init__()
            self.teacher, self.student, self.balanced = teacher, student, shares()

        def training_step(self, batch, index):
            logits = self.student(batch[0])
            losses = example("pytorch").losses_of(logits, self.teacher(batch[0]), batch[1])
            return self.balanced(losses, features=logits)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.student.parameters(), lr=LR)
            self.balanced.save_with(optimizer)
            return optimizer

        def configure_gradient_clipping(self, optimizer, **options):
            norms.append(clip_grad_norm_(self.student.parameters(), torch.inf).item())
            super().configure_gradient_clipping(optimizer, **options)

    class Observed(example("lightning").Distillation):
        def configure_optimizers(self):
            return dk.DTOAdamW(self.student.parameters(), lr=LR)

        def on_train_batch_end(self, *_):
            super().on_train_batch_end()
            if len(norms) < self.trainer.global_step:
                norms.append(self.trainer.callback_metrics["grad_norm"].item())

    module, samples = (OneLoss if one_loss else Observed)(teacher(), student()), TensorDataset(*data())
    # Lightning's own sampler of ranks would shuffle
    sampler = DistributedSampler(samples, shuffle=False) if "devices" in options else None
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
    ).fit(module, DataLoader(samples, batch_size=batch, sampler=sampler))
    return module.student, norms


def on_ranks(rank, size, name, folder):
    """What each of several processes does, started as torchrun starts it; the parameters and the norms."""
    import warnings

    warnings.simplefilter("ignore")  # trainers warn of much
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    os.environ.update({key: str(value) for key, value in there.items()}, TORCHELASTIC_RUN_ID="0")
    batch, accumulate = BATCH // size, 1
    if name == "lightning":
        model, norms = fitted(accumulate, batch, devices=size, strategy="ddp", num_nodes=1)
    elif name == "accelerate":
        _, model, _, norms = accelerated(batch=batch, accumulate=accumulate)
    else:
        _, trainer = hugging_face(folder, accumulate, batch, exact=name == "exact")
        trainer.train()
        model, norms = trainer.accelerator.unwrap_model(trainer.model), logged(trainer, "grad_norm")
    return [p.detach() for p in model.parameters()], norms
