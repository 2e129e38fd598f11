"""`dtokd train`: options, timm's own loop, objectives, gradients, errors."""

import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
import yaml
from dtokd.cli import main
from dtokd.errors import UsageError
from dtokd.objectives.teacher import Teacher
from dtokd.train import options as train_options
from dtokd.train import reading
from dtokd.train.optimizer import parse_source
from dtokd.values import parser_of
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import FeatureDistillationTask, LogitDistillationTask, create_classification_loss
from timm.utils import dispatch_clip_grad, random_seed

from dtokd_kernels import weighting

from .digits import common, distilling, write_teacher
from .refused import refused
from .written import rows

pytestmark = pytest.mark.usefixtures("one_thread")


def run(digits, output, *more):
    assert main(["train", *common(digits, output), "--experiment", "x", *map(str, more)]) == 0
    return output / "x"


def fails(capsys, digits, output, *more):
    return refused(capsys, "train", *common(digits, output), "--experiment", "x", *more)


def timm_loop(digits, teacher_path, distill_type, accumulate=1, amp=False):
    """What timm's train.py does, from timm's pieces: two epochs; the trained task."""
    random_seed(42, 0)
    student = timm.create_model("test_resnet", num_classes=10)
    config = resolve_data_config({"img_size": 32}, model=student)
    train = create_dataset("", root=str(digits), split="train", is_training=True, batch_size=16)
    mixup = FastCollateMixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=10)
    loader = create_loader(
        train, config["input_size"], 16, is_training=True, re_prob=0.25, re_mode="pixel", auto_augment="rand-m5",
        interpolation="random", mean=config["mean"], std=config["std"], num_workers=0, collate_fn=mixup,
        device=torch.device("cpu"), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), color_jitter=0.4,
    )  # fmt: skip
    validation = create_loader(
        create_dataset("", root=str(digits), split="validation"), config["input_size"], 16, num_workers=0,
        interpolation=config["interpolation"], mean=config["mean"], std=config["std"], crop_pct=config["crop_pct"],
        device=torch.device("cpu"),
    )  # fmt: skip
    teacher = timm.create_model("test_resnet", num_classes=10)
    teacher.load_state_dict(load_file(teacher_path))
    criterion = create_classification_loss(smoothing=0.1, soft_targets=True)
    kind, more = {"logit": (LogitDistillationTask, {"temperature": 4.0}), "feature": (FeatureDistillationTask, {})}[
        distill_type
    ]
    task = kind(student, teacher, criterion=criterion, task_loss_weight=0.3, **more)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=0.001, weight_decay=2e-5, momentum=0.9)
    ema = task.setup_ema(decay=0.9)
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=2)
    updates = 0
    for epoch in range(epochs):
        task.train()
        optimizer.zero_grad()
        for index, (input, target) in enumerate(loader):
            with torch.autocast("cpu", torch.bfloat16) if amp else nullcontext():
                loss = task(input, target)["loss"]
            if accumulate > 1:
                loss = loss / min(accumulate, len(loader) - index // accumulate * accumulate)
            loss.backward()
            if (index + 1) % accumulate and index + 1 < len(loader):
                continue
            dispatch_clip_grad(task.get_clip_parameters(), 1.0, mode="norm")
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            task.update_ema(step=updates)
            scheduler.step_update(num_updates=updates)
        for model in (task.get_eval_model(), task.get_eval_model(ema=True)):
            model.eval()
            for _ in validation:  # takes a random number for its workers
                pass
        scheduler.step(epoch + 1)
    return student, ema.module


@pytest.mark.parametrize(("distill_type", "accumulate"), [("logit", 1), ("feature", 3)])
def test_no_balance_is_timms_own_training(digits, teacher, tmp_path, distill_type, accumulate):
    """Seed 42 for both: the same parameters bit for bit."""
    expected, expected_ema = timm_loop(digits, teacher, distill_type, accumulate)
    path = run(
        digits, tmp_path, *distilling(teacher), "--kd-distill-type", distill_type, "--task-loss-weight", 0.3,
        "--opt", "adamw", "--clip-grad", 1, "--mixup", 0.2, "--reprob", 0.25, "--aa", "rand-m5", "--model-ema",
        "--model-ema-decay", 0.9, "--grad-accum-steps", accumulate,
    )  # fmt: skip
    from dtokd.train.checkpoint import load_checkpoint

    state = load_checkpoint(path / "checkpoints" / "epoch-0002.safetensors")
    for name, value in expected.state_dict().items():
        assert torch.equal(state["weights"][f"student.{name}"], value), name
    ema = getattr(expected_ema, "student", expected_ema).state_dict()
    exported = load_file(path / "student-last.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in ema.items())


def test_student_loads_in_timm(digits, teacher, tmp_path):
    path = run(digits, tmp_path, *distilling(teacher), "--kd-balance", "dto", "--opt", "dtoadamw", "--epochs", 1)
    student = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(path / "student.safetensors"))
    assert all(torch.isfinite(p).all() for p in student.parameters())


@pytest.mark.parametrize(
    "options",
    [
        "--opt dtoadamw --kd-balance dto --amp --amp-dtype bfloat16 --clip-grad 1",
        "--opt dtosgd --kd-balance pcgrad --amp --amp-dtype float16 --kd-balance-gram feature:conv1",
        "--opt adamw --kd-balance famo --kd-distill-type feature --kd-balance-params all --clip-grad 1",
        "--opt lamb --kd-balance dto --kd-balance-gram every:2:overlap --kd-balance-rescale none",
        "--opt dtoadamw --kd-balance dto --kd-balance-gram probe:layer4 --grad-checkpointing --grad-accum-steps 2",
    ],
)
def test_balances(digits, teacher, tmp_path, options):
    path = run(digits, tmp_path, *distilling(teacher), *options.split(), "--epochs", 1)
    (row,) = rows(path / "summary.csv")
    objective = "feature" if "--kd-distill-type feature" in options else "kl"
    assert float(row["weight_task"]) + float(row[f"weight_{objective}"]) > 0
    assert float(row["skip_rate"]) == 0
    updates = 2 if "accum" in options else 4
    assert [float(r["step"]) for r in rows(path / "steps.csv")] == list(range(updates))


def test_balanced_accumulation_of_another_optimizer(tmp_path):
    """Two equal micro-batches fill `.grad` with what one of them would: their sum is no longer than a batch's."""
    from dtokd.train.steps import Filled

    filled = []
    for share in (1, 2):
        w = torch.nn.Parameter(torch.ones(3))
        optimizer, scaler = torch.optim.AdamW([w]), torch.amp.GradScaler("cpu", enabled=False)
        options = {"weighting": weighting.DTO(), "gram": None, "private": "own", "rescale": "none"}
        stepper = Filled(optimizer, scaler, None, **options)
        for _ in range(share):
            stepper.backward({"objectives": {"task": w.square().sum(), "kl": (w - 3).square().sum()}}, share)
        filled.append(w.grad)
    torch.testing.assert_close(*filled)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_token(digits, teacher, tmp_path, kind):
    tiny = ["--model", "deit_tiny_distilled_patch16_224", "--model-kwargs", "depth=1", "embed_dim=24", "num_heads=3"]
    token = ["--kd-distill-type", "token", "--kd-token-distill-type", kind, "--kd-balance", "dto", "--opt", "dtoadamw"]
    path = run(digits, tmp_path, *tiny, *distilling(teacher), *token, "--epochs", 1)
    (row,) = rows(path / "summary.csv")
    assert float(row["train_token"]) > 0
    assert 0 <= float(row["weight_task"]) <= 1


def test_torchvision_folder(digits, capsys, tmp_path):
    """Another kind of data set: the same images in the same order, so the same epoch."""
    ours = run(digits, tmp_path / "a", "--epochs", 1)
    theirs = run(digits, tmp_path / "b", "--epochs", 1, "--dataset", "torch/image_folder")
    assert rows(ours / "summary.csv")[0]["train_loss"] == rows(theirs / "summary.csv")[0]["train_loss"]
    options = ["--dataset", "torch/image_folder", "--val-split", "holdout"]
    assert "has no folder 'holdout'" in fails(capsys, digits, tmp_path, *options)
    assert "cannot be opened" in fails(capsys, tmp_path, tmp_path, "--dataset", "torch/cifar100")


def test_losses_are_read_at_the_log_interval_only(digits, teacher, tmp_path, monkeypatch):
    """Between the lines the loop and the steps ask the device for nothing."""
    from dtokd.train.divergence import Losses

    reads = []
    compute = Losses.compute
    monkeypatch.setattr(Losses, "compute", lambda self: reads.append(1) or compute(self))

    item = torch.Tensor.item

    def watched(self):
        assert "dtokd/train" not in sys._getframe(1).f_code.co_filename
        return item(self)

    monkeypatch.setattr(torch.Tensor, "item", watched)
    run(digits, tmp_path, *distilling(teacher), "--epochs", 1, "--log-interval", 2, "--opt", "adamw", "--clip-grad", 1)
    assert len(reads) == 4  # after the first, two and four iterations, and for the summary


def test_fixed_balance_is_the_weighted_sum(digits, teacher, tmp_path):
    """float32 rounding only: the same gradients are added in another order."""
    shared = [*distilling(teacher), "--task-loss-weight", 0.25, "--opt", "sgd", "--lr", 0.01]
    plain = run(digits, tmp_path / "none", *shared)
    fixed = run(digits, tmp_path / "fixed", *shared, "--kd-balance", "fixed", "--kd-balance-rescale", "none")
    a, b = (load_file(path / "student-last.safetensors") for path in (plain, fixed))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5)


def test_dtoadamw_and_adamw_agree(digits, teacher, tmp_path):
    """The fused optimizer and `dtokd_kernels.backward` with torch's take the same steps, up to rounding."""
    shared = [*distilling(teacher), "--kd-balance", "dto", "--epochs", 1, "--clip-grad", 0.5]
    a, b = (run(digits, tmp_path / opt, *shared, "--opt", opt) for opt in ("dtoadamw", "adamw"))
    first, second = rows(a / "steps.csv"), rows(b / "steps.csv")
    assert float(first[0]["weight_task"]) == pytest.approx(float(second[0]["weight_task"]), rel=1e-5)
    assert float(rows(a / "summary.csv")[0]["train_task"]) == pytest.approx(
        float(rows(b / "summary.csv")[0]["train_task"]), rel=1e-3
    )


def test_names_of_the_balances():
    assert ("none", *sorted(weighting.NAMES)) == train_options.BALANCES


@pytest.mark.parametrize("schedule", ["cosine", "none"])
def test_learning_rates_of_layers(digits, tmp_path, schedule):
    """The report has the schedule's, of which lower layers have a part, also without a schedule."""
    from dtokd.train.checkpoint import load_checkpoint

    path = run(digits, tmp_path, "--epochs", 1, "--layer-decay", 0.5, "--sched", schedule)
    assert [float(row["lr"]) for row in rows(path / "summary.csv")] == [0.001]
    state = load_checkpoint(path / "checkpoints" / "epoch-0001.safetensors")
    for group in state["stepper"]["optimizer"]["param_groups"]:
        scheduled = 0.0 if schedule == "cosine" else 0.001
        assert group["lr"] == pytest.approx(scheduled * group["lr_scale"])


@pytest.mark.parametrize(
    "text", ["exact", "overlap", "lag", "probe", "probe:conv1,layer1.0", "feature:layer2", "every:5"]
)
def test_sources_of_the_gram(text):
    assert parse_source(text, timm.create_model("test_resnet")) is not None


@pytest.mark.parametrize("text", ["exactly", "every", "every:x", "feature", "feature:nothing", "ema:2", "probe:a"])
def test_no_source_of_the_gram(text):
    with pytest.raises(UsageError, match="--kd-balance-gram"):
        parse_source(text, timm.create_model("test_resnet"))


def test_config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: vit\nlr: 1e-3\nopt-betas: [0.9, 0.95]\namp: true\nopt_kwargs: {a: 1}\n")
    options = reading.parse(parser_of(train_options), ["-c", str(path), "--model", "resnet"])
    assert (options.model, options.lr, options.opt_betas, options.amp) == ("resnet", 1e-3, [0.9, 0.95], True)
    assert options.opt_kwargs == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x", "no option is called 'modle'; did you mean model"),
        ("epochs: many", "epochs: 'many'; expected a whole number from 1 on"),
        ("epochs: 1.5", "epochs: '1.5'; expected a whole number from 1 on"),
        ("amp: 3", "amp is 3; expected true or false"),
        ("input_size: 32", "expected a list"),
        ("kd_balance: dta", "choose from none, "),
        ("- a", "not a mapping of options"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_config(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        reading.parse(parser_of(train_options), ["--config", str(path)])


def test_args_are_a_config(digits, tmp_path):
    path = run(digits, tmp_path, "--epochs", 1)
    again = reading.parse(parser_of(train_options), ["-c", str(path / "args.yaml")])
    assert train_options.plain(again) == yaml.safe_load((path / "args.yaml").read_text())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "resnet_of_nobody"], "--model: timm has no model"),
        (["--num-classes", "7"], "--num-classes: 7, but 'train' has 10 classes"),
        (["--val-split", "holdout"], "has no folder 'holdout'"),
        (["-b", "1000"], "--batch-size: 1000, but 'train' holds 64 images"),
        (["-b", "15", "--mixup", "0.1"], "pass an even one"),
        (["-b", "1"], "--batch-size: 1, but the model needs more images to normalize by; pass 2 or more"),
        (["--baseline", "nowhere"], "--baseline: nowhere is no run directory"),
        (["--opt", "adamwx"], "--opt: no optimizer is called 'adamwx'"),
        (["--opt", "more_adamw"], "--opt: no optimizer is called 'more_adamw'"),
        (["--opt", "lookahead_dtoadamw"], "choose dtoadamw, or lookahead_adamw with --kd-balance"),
        (["--opt", "dtoadamw"], "choose --kd-balance, such as whilebetter, or --opt adamw"),
        (["--kd-balance", "dto"], "pass --kd-model-name"),
        (["--kd-balance-gram", "lag"], "nothing is balanced"),
        (["--kd-model-name", "nobody"], "Unknown model (nobody)"),
        (["--initial-checkpoint", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
        (["--resume", "nowhere.safetensors"], "--resume: there is no file nowhere.safetensors"),
        (["--data-dir", "nowhere"], "--data-dir: nowhere does not exist"),
    ],
)
def test_bad_options(capsys, digits, tmp_path, more, message):
    assert message in fails(capsys, digits, tmp_path, *more)
    assert not (tmp_path / "x" / "summary.csv").exists()


def vit_weights(folder):
    path = folder / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=10).state_dict(), path)
    return path


def test_bad_teachers(capsys, digits, teacher, tmp_path):
    eleven = write_teacher(tmp_path / "eleven.safetensors", classes=11)
    classes = fails(capsys, digits, tmp_path, *distilling(eleven))
    assert "the student has 10 classes, the teacher 'test_resnet' 11" in classes
    other = ["--kd-model-name", "test_vit", "--kd-teacher-path", teacher]
    assert "does not hold weights of 'test_vit'" in fails(capsys, digits, tmp_path, *other)
    small = ["--kd-teacher-img-size", "4"]
    assert "does not take the student's images of (3, 32, 32)" in fails(
        capsys, digits, tmp_path, "--kd-model-name", "test_vit", "--kd-teacher-path", vit_weights(tmp_path), *small
    )
    nonsense = tmp_path / "nonsense.safetensors"
    nonsense.write_bytes(b"nonsense")
    assert "neither a safetensors file nor" in fails(capsys, digits, tmp_path, *distilling(nonsense))
    token = fails(capsys, digits, tmp_path, *distilling(teacher), "--kd-distill-type", "token")
    assert "--kd-distill-type token: the student" in token


def test_classes_of_the_splits_differ(capsys, digits, tmp_path):
    data = shutil.copytree(digits, tmp_path / "data")
    (data / "validation" / "9").rename(data / "validation" / "nine")
    assert "labels would not mean the same" in fails(capsys, data, tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images(capsys, digits, tmp_path, workers):
    data = shutil.copytree(digits, tmp_path / "data")
    first, second = sorted((data / "train" / "3").iterdir())[:2]
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:100])
    options = ["--workers", workers, "--epochs", 2]
    error = fails(capsys, data, tmp_path / "a", *options, "--on-bad-image", "error")
    assert "pass --on-bad-image skip" in error
    assert "Traceback" not in error
    path = run(data, tmp_path / "b", *options)
    told = capsys.readouterr().out
    assert told.index("skipped image: train: ") < told.index("epoch 2/2")
    assert told.count("skipped image: train: ") == 2  # each once, though read in two epochs
    assert all(str(Path("3") / image.name) in told for image in (first, second))
    assert len(rows(path / "summary.csv")) == 2
    assert Image.open(sorted((data / "train" / "4").iterdir())[0]).size == (32, 32)


def test_three_objectives_of_a_recipe(digits, teacher, tmp_path):
    """A recipe's options, overridden by the command line: task, predictions and features."""
    path = run(
        digits, tmp_path, "--config", "recipe:cifar100/resnet56-resnet20/dto", "--dataset", "", *distilling(teacher),
        "--num-classes", "10", "--batch-size", "16", "--device", "cpu", "--opt", "dtosgd",
    )  # fmt: skip
    row = rows(path / "summary.csv")[-1]
    weights = [float(row[f"weight_{name}"]) for name in ("task", "kl", "feature")]
    assert sum(weights) == pytest.approx(1)


def test_cached_teacher_gives_the_same_run(digits, teacher, tmp_path, monkeypatch):
    """A second run reads what the first has written, and its teacher is never asked."""
    shared = [*distilling(teacher), "--kd-cache-teacher", str(tmp_path / "cache"), "--kd-cache-views", "2"]
    shared += ["--opt", "dtoadamw", "--kd-balance", "dto", "--no-kd-eval-teacher"]
    first = run(digits, tmp_path / "first", *shared)
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "__call__", asked_once(Teacher.__call__))
        second = run(digits, tmp_path / "second", *shared)
    one, two = (load_file(path / "student-last.safetensors") for path in (first, second))
    assert all(torch.equal(one[key], two[key]) for key in one)


def asked_once(call):
    """For the check of the image size before training."""
    count = [0]

    def asked(*args):
        count[0] += 1
        assert count[0] == 1, "the teacher ran though its outputs are on disk"
        return call(*args)

    return asked
