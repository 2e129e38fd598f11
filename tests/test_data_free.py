"""`dtokd train --data-free`: images that are made from a teacher, and a student that learns from them."""

import copy
import json
import math
import os
import shutil
import signal
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from dtokd.cli import main
from dtokd.datafree.augment import Augment
from dtokd.datafree.balance import parse_balance
from dtokd.datafree.bank import Bank
from dtokd.datafree.build import resolve
from dtokd.datafree.generator import Generator
from dtokd.datafree.loader import SyntheticBatches
from dtokd.datafree.losses import NAMES, ImageLosses, disagreement, pixel_prior
from dtokd.datafree.statistics import BatchStatistics, NoStatistics
from dtokd.datafree.synthesis import Fast, Inversion, Settings, judging
from dtokd.errors import Diverged, UsageError
from dtokd.objectives.teacher import resolve_teachers
from dtokd.train import options as train_options
from dtokd.train.reading import parse
from dtokd.train.rundir import RunDir, read_rows
from dtokd.values import parser_of
from safetensors.torch import save_file
from torch import nn

from benchmarks.datafree import protocol, students
from benchmarks.datafree.sets import World
from benchmarks.digits import Images
from benchmarks.journal import Journal, read
from dtokd_kernels.weighting import Fixed

from .digits import write_digits
from .test_train_resume import die_and_resume, stop_and_resume

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (3, 16, 16)
ROOT = Path(__file__).parents[1]


def tiny(channels=3, seed=0, classes=4):
    """A network with batch normalisation that has seen some noise."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, classes),
    )  # fmt: skip
    for _ in range(20):
        model(torch.randn(16, channels, 16, 16) * 2 + 1)
    return model.eval().requires_grad_(False)


def made(method, weights=(1.0, 1.0, 1.0), steps=3, lr=0.05, **more):
    """A method with a tiny teacher and student."""
    teacher, student = tiny(), tiny(seed=1).train()
    losses = ImageLosses(teacher, student, BatchStatistics(teacher, 0.5), prior=more.pop("prior", None))
    settings = Settings(SIZE, [0.5] * 3, [0.25] * 3, 4, 8, steps, lr, Augment(1))
    torch.manual_seed(3)
    if method == "fast":
        made = Fast(settings, losses, Fixed(weights), Generator(SIZE, 6, 4), latent_lr=0.02, rate=0.5, gram="exact")
    else:
        made = Inversion(settings, losses, Fixed(weights), "exact")
    return made, student


def test_statistics_are_those_of_the_layers_input():
    model = tiny()
    images = torch.randn(8, 3, 16, 16)
    seen = model[0](images)
    layer = model[1]
    mean, variance = seen.mean((0, 2, 3)), seen.var((0, 2, 3), unbiased=False)
    expected = (mean - layer.running_mean).norm() + (variance - layer.running_var).norm()
    statistics = BatchStatistics(model, momentum=0.75)
    with statistics:
        model(images)
        assert torch.allclose(statistics.take(), expected)
        statistics.remember()
        model(images + 1)
        seen = model[0](images + 1)
        mean = 0.25 * seen.mean((0, 2, 3)) + 0.75 * mean
        variance = 0.25 * seen.var((0, 2, 3), unbiased=False) + 0.75 * variance
        expected = (mean - layer.running_mean).norm() + (variance - layer.running_var).norm()
        assert torch.allclose(statistics.take(), expected)
    assert not model[1]._forward_pre_hooks


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: timm.create_model("test_vit"), "no batch normalisation"),
        (lambda: timm.create_model("test_resnet"), "has seen no image"),
    ],
)
def test_a_teacher_without_usable_statistics_is_refused(model, reason):
    with pytest.raises(NoStatistics, match=reason):
        BatchStatistics(model())


def test_statistics_that_are_not_finite_are_refused():
    model = tiny()
    model[1].running_var[0] = math.nan
    with pytest.raises(NoStatistics, match="not finite"):
        BatchStatistics(model)


def test_disagreement_falls_where_the_two_differ_more():
    teacher = torch.tensor([[4.0, 0.0, 0.0]])
    for kind in ("kl", "js"):
        near, far = (disagreement(torch.tensor([[x, 0.0, 0.0]]), teacher, kind) for x in (3.5, 1.0))
        assert far < near
        assert disagreement(teacher, teacher, kind) == pytest.approx(0 if kind == "kl" else 1, abs=1e-6)
    # other classes: "kl" has no more to win, "js" is near its bound
    other = torch.tensor([[-9.0, 9.0, 0.0]])
    assert disagreement(other, teacher, "kl") == 0
    assert disagreement(other * 5, teacher * 5, "js") == pytest.approx(0, abs=1e-3)


def test_the_log_gradient_of_the_bounded_form_is_the_gradient_of_the_other():
    student = torch.tensor([[1.0, 0.5, 0.0], [2.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[3.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
    (raw,) = torch.autograd.grad(disagreement(student, teacher, "kl"), student)
    (log,) = torch.autograd.grad(disagreement(student, teacher, "kl", logarithms=True).log(), student)
    torch.testing.assert_close(log, raw)


def test_the_bank_keeps_the_newest():
    bank = Bank(5, (1, 2, 2))
    for first in (0, 3, 6, 9):
        values = torch.arange(first, first + 3)
        bank.add(values.view(3, 1, 1, 1).expand(3, 1, 2, 2) / 255, values)
    assert len(bank) == 5
    images, labels = bank.newest(5)
    assert labels.tolist() == [7, 8, 9, 10, 11]
    assert images[:, 0, 0, 0].tolist() == labels.tolist()
    images, labels = bank.sample(64)
    assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
    assert set(labels.tolist()) == {7, 8, 9, 10, 11}
    bank.add(torch.zeros(12, 1, 2, 2), torch.arange(12))
    assert sorted(bank.newest(9)[1].tolist()) == [7, 8, 9, 10, 11]


def test_a_bank_goes_on_from_one_of_another_size():
    def add(bank, first, count):
        values = torch.arange(first, first + count)
        bank.add(values.view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 255, values)

    small, large = Bank(5, (1, 2, 2)), Bank(8, (1, 2, 2))
    add(small, 0, 4)
    add(small, 4, 3)
    large.load_state_dict(small.state_dict())
    for first, kept in ((7, range(2, 9)), (9, range(3, 11)), (11, range(5, 13))):
        add(large, first, 2)
        images, labels = large.newest(8)
        assert labels.tolist() == list(kept)
        assert images[:, 0, 0, 0].tolist() == list(kept)
    tiny = Bank(3, (1, 2, 2))
    for bank, kept in ((small, [4, 5, 6]), (large, [10, 11, 12])):
        tiny.load_state_dict(bank.state_dict())
        assert tiny.newest(3)[1].tolist() == kept
        add(tiny, 20, 2)
        assert tiny.newest(3)[1].tolist() == [kept[-1], 20, 21]


def test_augment_shifts_and_flips():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    assert torch.equal(Augment()(image), image)
    assert torch.equal(Augment(hflip=1, vflip=1)(image), image.flip(-1, -2))
    torch.manual_seed(0)
    shifted = Augment(1)(image.expand(200, -1, -1, -1))
    assert {float(corner) for corner in shifted[:, 0, 0, 0]} == {0.0, 1.0, 4.0, 5.0}
    assert len(shifted.flatten(1).unique(dim=0)) == 9


@pytest.mark.parametrize("sides", [(18, 16), (2, 4)])
def test_a_generator_refuses_sizes_that_it_does_not_make(sides):
    with pytest.raises(ValueError, match="multiples of 4"):
        Generator((1, *sides))


def test_a_generator_makes_images_of_the_size():
    images = Generator((1, 12, 20), 5, 4)(torch.randn(3, 5))
    assert images.shape == (3, 1, 12, 20)
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("method", ["fast", "inversion"])
def test_images_come_to_fit_the_teacher(method):
    synthesis, student = made(method, steps=40)
    seen = []
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with judging(student):
        images, _ = synthesis.make(lambda balance, losses: seen.append((balance, losses)))
    assert images.shape == (8, *SIZE)
    assert images.min() >= -1e-6
    assert images.max() <= 1 + 1e-6
    assert len(seen) == 40
    assert seen[0][0].names == NAMES
    assert seen[-1][1]["statistics"] < 0.7 * seen[0][1]["statistics"]
    assert seen[-1][1]["confidence"] < seen[0][1]["confidence"]
    # the student is as it was, and has no gradients
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())


def test_the_prior_is_a_part_of_the_statistics():
    flat, rough = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    rough[..., ::2] = 1.0
    prior = pixel_prior(2.0, 0.5)
    assert prior(flat) == 0
    assert prior(rough) == pytest.approx(2.0 + 0.25)


@pytest.mark.parametrize("method", ["fast", "inversion"])
def test_a_batch_whose_losses_are_not_finite_is_an_error(method):
    synthesis, student = made(method)
    with torch.no_grad():
        student[5].weight.fill_(math.nan)
    with pytest.raises(Diverged, match="disagreement"):
        synthesis.make(lambda *step: None)


@pytest.mark.parametrize("method", ["fast", "inversion"])
def test_a_method_goes_on_from_its_state(method):
    first, _ = made(method)
    first.make(lambda *step: None)
    state, random = copy.deepcopy(first.state_dict()), torch.get_rng_state()
    images, labels = first.make(lambda *step: None)
    second, _ = made(method)
    second.load_state_dict(state)
    torch.set_rng_state(random)
    again, same = second.make(lambda *step: None)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)


def test_balance_is_read_from_its_text():
    assert parse_balance("fixed:10,0.4,1.1").weights == [10, 0.4, 1.1]
    assert parse_balance("share:0.5,0.3,0.2").shares == [0.5, 0.3, 0.2]
    assert parse_balance("cagrad:c=0.3").c == 0.3
    for text in ("nothing", "fixed:1,2", "dto:1,2,3", "cagrad:d=3", "share:1,1,1", "heldout", "fixed:a,b,c", "dto:x"):
        with pytest.raises(UsageError, match="--df-balance"):
            parse_balance(text)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Images to be judged by, and a teacher that has seen them."""
    root = write_digits(tmp_path_factory.mktemp("digits"))
    torch.manual_seed(1)
    teacher = timm.create_model("test_resnet", num_classes=10).train()
    for _ in range(5):
        teacher(torch.randn(16, 3, 32, 32))
    save_file(teacher.state_dict(), root / "teacher.safetensors")
    return root


def options(digits, output, *more, method="fast"):
    """A run of two epochs of four iterations."""
    own = "--df-width 4 --df-latent-dim 8" if method == "fast" else ""
    texts = f"""train --data-free {method} --kd-model-name test_resnet --kd-teacher-path {digits}/teacher.safetensors
        --model test_resnet --model-kwargs channels=[8,8,8,8] stem_width=4 --num-classes 10 --img-size 32 -b 8
        --epochs 2 --warmup-epochs 0 --lr 0.001 --workers 0 --device cpu --no-log-tensorboard --output {output}
        --df-steps 2 --df-every 2 --df-warmup 2 --df-batch-size 8 --df-bank 20 --df-iterations 4 {own}"""
    return [*texts.split(), *more]


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """A run that is judged by real images."""
    torch.set_num_threads(1)  # as those that are compared with it
    folder = tmp_path_factory.mktemp("run")
    argv = options(digits, folder / "a", "--experiment", "x", "--data-dir", str(digits))
    argv += ["--opt", "dtoadamw", "--kd-balance", "famo", "--df-balance", "famo"]
    assert main(argv) == 0
    return folder, argv


def test_a_run_leaves_its_files(finished):
    run = finished[0] / "a" / "x"
    steps = read_rows(run / "generator.csv")
    assert [int(float(row["step"])) for row in steps] == list(range(2 * (2 + 2 + 2)))
    assert {"weight_statistics", "cosine_statistics_confidence", "loss_disagreement"} <= steps[0].keys()
    epochs = read_rows(run / "summary.csv")
    assert {"df_loss_statistics", "df_conflict_rate", "eval_top1", "weight_task"} <= epochs[0].keys()
    assert sorted(path.name for path in (run / "synthetic").iterdir()) == ["epoch-0001.png", "epoch-0002.png"]


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_run_goes_on_bit_for_bit(finished, how, monkeypatch):
    folder, argv = finished
    shutil.rmtree(folder / "b", ignore_errors=True)
    if how == "killed":
        die_and_resume(argv, folder, monkeypatch, 7)
    else:
        stop_and_resume(argv, folder, monkeypatch, [3, 6])
    one, two = ((folder / part / "x" / "generator.csv").read_text() for part in ("a", "b"))
    assert one == two


def test_a_run_that_goes_on_from_an_earlier_epoch_puts_later_images_aside(finished, tmp_path):
    folder, argv = finished
    argv = [str(tmp_path / "d") if text == str(folder / "a") else text for text in argv]
    run = shutil.copytree(folder / "a" / "x", tmp_path / "d" / "x")
    first = str(RunDir(folder / "a" / "x").checkpoints()[1])  # of another run, with the same history
    assert main([*argv, "--resume", first, "--epochs", "1"]) == 0
    assert [path.name for path in (run / "synthetic").iterdir()] == ["epoch-0001.png"]
    aside = run / "before-resume-1"
    assert [path.name for path in (aside / "synthetic").iterdir()] == ["epoch-0002.png"]
    before = read_rows(folder / "a" / "x" / "generator.csv")
    assert read_rows(aside / "generator.csv") == before
    assert read_rows(run / "generator.csv") == before[: 2 * (2 + 2)]


def test_a_run_that_goes_on_elsewhere_takes_its_images_with_it(finished, tmp_path):
    folder, argv = finished
    argv = [str(tmp_path / "e") if text == str(folder / "a") else text for text in argv]
    assert main([*argv, "--resume", str(RunDir(folder / "a" / "x").checkpoints()[1])]) == 0
    for name in ("generator.csv", "synthetic/epoch-0001.png", "synthetic/epoch-0002.png"):
        assert (tmp_path / "e" / "x" / name).read_bytes() == (folder / "a" / "x" / name).read_bytes()


def test_other_learning_rates_of_the_images_hold_after_a_resume(finished, tmp_path, monkeypatch):
    folder, argv = finished
    argv = [str(tmp_path / "f") if text == str(folder / "a") else text for text in argv]
    seen, make = [], SyntheticBatches.make

    def watched(self):
        seen.append([group["lr"] for group in self.synthesis._optimizer.param_groups])
        make(self)

    monkeypatch.setattr(SyntheticBatches, "make", watched)
    more = ["--df-lr", "0.02", "--df-latent-lr", "0.5", "--resume", str(RunDir(folder / "a" / "x").checkpoints()[1])]
    assert main([*argv, *more]) == 0
    assert seen == [[0.02, 0.5]] * 2


def test_the_best_student_stays_where_later_epochs_are_not_judged(finished, tmp_path):
    folder, argv = finished
    run = shutil.copytree(folder / "a" / "x", tmp_path / "g" / "x")
    argv = [str(tmp_path / "g") if text == str(folder / "a") else text for text in argv]
    at = argv.index("--data-dir")
    before = (run / "student.safetensors").read_bytes()
    assert main([*argv[:at], *argv[at + 2 :], "--resume", "auto", "--epochs", "3"]) == 0
    assert (run / "student.safetensors").read_bytes() == before
    assert (run / "student-last.safetensors").read_bytes() != before


def test_a_run_has_room_beside_its_own_checkpoints(finished, tmp_path, monkeypatch, capsys):
    folder, argv = finished
    argv = [str(tmp_path / "h") if text == str(folder / "a") else text for text in argv]
    run = shutil.copytree(folder / "a" / "x", tmp_path / "h" / "x")
    held = sum(path.stat().st_size for path in RunDir(run).checkpoints().values())
    need = (10 + 2) * 20 * 3 * 32 * 32
    for free, code in ((need - held, 0), (need - held - 1, 2)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Namespace(free=free))
        assert main([*argv, "--resume", "auto"]) == code
    assert "GiB more" in capsys.readouterr().err


def test_a_dry_run_counts_each_making_of_images_once(digits, tmp_path, monkeypatch, capsys):
    """By a clock on which a making takes a second, and all else next to nothing."""
    clock, synthesise = [0.0], Fast.make

    def slow(self, watch):
        clock[0] += 1
        return synthesise(self, watch)

    monkeypatch.setattr(Fast, "make", slow)
    for name in ("monotonic", "perf_counter"):
        real = getattr(time, name)
        monkeypatch.setattr(time, name, lambda real=real: clock[0] + real() / 1e4)
    more = ["--dry-run", "--df-every", "5", "--df-iterations", "100", "--df-warmup", "20"]
    assert main([*options(digits, tmp_path), *more]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "an epoch (100 iterations) takes about 20 s, 2 epochs 1 min 0 s with the first images, which take 20 s" in told
    )


def test_a_signal_ends_the_making_of_the_first_images(finished, monkeypatch):
    folder, argv = finished
    argv = [str(folder / "c") if text == str(folder / "a") else text for text in argv]
    make, calls = SyntheticBatches.make, []

    def signalled(self):
        calls.append(make(self))
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SyntheticBatches, "make", signalled)
    assert main(argv) == 128 + signal.SIGTERM
    assert len(calls) == 1
    torch.rand(7)  # the new process's generators are elsewhere
    assert main([*argv, "--resume", "auto"]) == 0
    one, two = ((folder / part / "x" / "generator.csv").read_text() for part in ("a", "c"))
    assert one == two


def test_classes_and_channels_are_those_of_the_teachers_run(finished, digits, tmp_path, capsys):
    run = tmp_path / "teacher"
    run.mkdir()
    card = json.loads((finished[0] / "a" / "x" / "config.json").read_text())
    card["label_names"] = card["label_names"][::-1]
    card["pretrained_cfg"] |= {"input_size": [1, 32, 32], "mean": [0.25], "std": [0.5]}
    (run / "config.json").write_text(json.dumps(card))
    argv = f"--data-free fast --kd-teacher-path {run} --kd-distill-type feature --img-size 48 --output {tmp_path}"
    chosen = parse(parser_of(train_options), argv.split())
    resolve_teachers(chosen)
    resolve(chosen)
    assert (chosen.in_chans, chosen.img_size, chosen.mean, chosen.std) == (1, 48, [0.25], [0.5])
    assert main(["train", *argv.split(), "--data-dir", str(digits), "--device", "cpu"]) == 2
    assert "has the classes 0, 1, 2, 3, 4, ... (10), the teacher 9, 8, 7, 6, 5, ..." in capsys.readouterr().err


def test_the_report_shows_images_and_conflicts(finished):
    text = (finished[0] / "a" / "x" / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 2
    assert "<th>disagreement</th>" in text
    assert "Images made from the teacher" in text
    assert "time, besides its part in making images." in text


def test_a_comparison_refuses_it(digits, tmp_path, capsys):
    argv = f"compare {digits} --data-free fast --kd-model-name test_resnet --output {tmp_path}/out".split()
    assert main(argv) == 2
    assert "--data-free: a comparison" in capsys.readouterr().err


def test_inversion_without_any_images(digits, tmp_path):
    argv = options(digits, tmp_path, "--experiment", "x", "--kd-distill-type", "logit", "feature", method="inversion")
    assert main(argv) == 0
    assert "eval_top1" not in read_rows(tmp_path / "x" / "summary.csv")[0]
    assert max(RunDir(tmp_path / "x").checkpoints()) == 2


def test_statistics_of_the_teacher_leave_the_images_as_they_were(digits, tmp_path):
    """They are estimated on the first images, before the run's directory is there."""
    argv = options(digits, tmp_path, "--kd-distill-type", "feature", "--epochs", "1", "--df-balance", "famo")
    assert main([*argv, "--experiment", "without"]) == 0
    assert main([*argv, "--experiment", "with", "--kd-feature-norm", "phi-s", "--kd-statistics-batches", "3"]) == 0
    one, two = (read_rows(tmp_path / name / "generator.csv") for name in ("without", "with"))
    assert len(one) == len(two) == 2 * (2 + 2)
    assert one[: 2 * (2 + 1)] == two[: 2 * (2 + 1)]  # until the student's first step


REFUSED = {
    "--data-free fast --kd-model-name test_resnet --kd-teacher-path {file} --num-classes 5 --img-size 32 "
    "--kd-distill-type feature": "has 10 classes; pass 10",
    "--data-free fast --kd-model-name test_resnet --kd-balance whilebetter --opt dtoadamw": "looks at held-out images",
    "--df-lr 0.1": "--df-lr",
    "--data-free fast": "--data-free: there is no teacher",
    "--data-free fast --kd-model-name test_resnet test_resnet": "one teacher",
    "--data-free fast --kd-model-name test_resnet --df-prior-tv 1": "--df-prior-tv",
    "--data-free fast --kd-model-name test_resnet --mixup 0.2": "--mixup",
    "--data-free fast --kd-model-name test_resnet --scale 0.5 1": "--scale: not supported with --data-free",
    "--data-free fast --kd-model-name test_resnet --color-jitter 0": "--color-jitter",
    "--data-free fast --kd-model-name test_resnet --kd-teacher-path {file} --num-classes 10 --img-size 32 "
    "--df-balance dto --df-balance-gram none": "--df-balance-gram none",
    "--data-free fast --kd-model-name test_resnet --kd-teacher-path {file}": "--num-classes",
    "--data-free fast --kd-model-name test_resnet --kd-teacher-path {file} --num-classes 10": "--img-size",
    "--data-free fast --kd-model-name test_resnet --kd-teacher-path {file} --num-classes 10 --img-size 30": "pass 32",
    "--data-free fast --kd-model-name test_vit --kd-teacher-path {vit} --num-classes 10 --img-size 160": "transformers",
    "--data-free fast --kd-model-name test_resnet --kd-teacher-path {file} --num-classes 10 --img-size 32 "
    "--df-bank 2000000000": "--df-bank",
}


@pytest.mark.parametrize(("texts", "told"), REFUSED.items())
def test_what_cannot_work_is_refused_before_anything_is_written(texts, told, digits, tmp_path, capsys):
    vit = digits / "vit.safetensors"
    if not vit.exists():
        save_file(timm.create_model("test_vit", num_classes=10).state_dict(), vit)
    texts = texts.format(file=digits / "teacher.safetensors", vit=vit)
    argv = f"train {texts} --model test_resnet --workers 0 --device cpu --output {tmp_path}/out".split()
    assert main(argv) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_benchmark_tunes_judges_and_goes_on(tmp_path, monkeypatch):
    images = torch.rand(80, 1, 8, 8) * 2 - 1
    held = Images(images, torch.arange(80) % 10)
    world = World(
        tiny(1, classes=10),
        lambda: tiny(1, seed=2, classes=10).requires_grad_(True),
        10,
        images,
        held,
        held,
        10.0,
    )
    monkeypatch.setattr(students, "world_of", lambda name: world)
    for name, value in {"WARMUP": 1, "STEPS": 2, "WIDTH": 2}.items():
        monkeypatch.setattr(students, name, value)
    monkeypatch.setattr(protocol, "GRID", ["fixed:1,1,1", "fixed:1,2,2"])
    path = tmp_path / "results.csv"

    def told(train):
        with ThreadPoolExecutor(1) as executor:
            journal = Journal(path, students.Run, students.Result, executor, train)
            protocol.carry_out("digits", ["data", "other", "tuned", "dto"], [0, 1], 2, journal)
            return protocol.table(protocol.outcomes("digits", [0, 1], 2, journal.done))

    text = told(students.train)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert [row[0].split(",")[0] for row in rows] == ["data", "other", "tuned", "dto"]
    assert [row[3] for row in rows[:3]] == ["", "", "reference"]
    assert float(rows[3][3]) == pytest.approx(float(rows[3][1].split()[0]) - float(rows[2][1].split()[0]), abs=0.11)
    done = read(path, students.Run, students.Result)
    # three rates of the maker, two more of the student, the two best with the second seed of tuning, then the best
    assert [run.seed for run in done if run.source == "dto"] == [100] * 5 + [101] * 2 + [0, 1]
    assert len({run.student_lr for run in done if run.source == "data"}) == 3
    assert {run.source for run in done if run.source.startswith("fixed")} == set(protocol.GRID)
    assert all(result.skipped == 0 for result in done.values())
    assert told(None) == text  # all is on file


def test_the_chosen_run_is_the_best_of_both_tuning_seeds():
    def train(runs):
        best = {100: (1e-2, 0.018), 101: (1e-2, 0.009)}
        return [
            students.Result(-abs(run.lr - lr) - 2 * abs(run.student_lr - student) * (run.seed == 101), *[0.0] * 7)
            for run in runs
            for lr, student in [best[run.seed]]
        ]

    chosen = protocol.tune(students.Run("digits", "dto", 0.0, 9e-3, 100, 5), train)
    assert (chosen.lr, chosen.student_lr) == (1e-2, 9e-3)


def test_documented_numbers_are_those_of_the_csv_file():
    done = read(ROOT / "benchmarks" / "results" / "datafree.csv", students.Run, students.Result)
    page, used = (ROOT / "docs" / "data-free.md").read_text(), set()
    for name in dict.fromkeys(run.data for run in done):
        outcomes = protocol.outcomes(name, protocol.SEEDS, protocol.ITERATIONS, done)
        assert protocol.table(outcomes) in page
        used.update(*(o.used for o in outcomes))
    assert set(done) == used


def test_the_demo_ends_with_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    from dtokd.datafree import demo
    from dtokd.demo import data

    monkeypatch.setattr(data, "TEACHER_IMAGES", 4400)
    monkeypatch.setattr(data, "TEACHER_COPIES", 1)
    monkeypatch.setattr(data, "STUDENT_COPIES", 1)
    monkeypatch.setattr(
        demo, "SHARED", demo.SHARED.replace("--warmup-epochs 1", "--warmup-epochs 0").replace("-b 64", "-b 256")
    )
    monkeypatch.setattr(demo, "TEACHER", demo.TEACHER.replace("--epochs 2", "--epochs 1"))
    monkeypatch.setattr(demo, "_STUDENT", demo._STUDENT.replace("--epochs 4", "--epochs 1"))
    short = "--df-iterations 2 --df-warmup 1 --df-batch-size 8 --df-steps 1 --df-width 2"
    runs = {name: (title, f"{texts} {short}" if texts else "", has) for name, (title, texts, has) in demo.RUNS.items()}
    monkeypatch.setattr(demo, "RUNS", runs)
    for seed in ("0", "1"):  # the teacher stays
        assert main(["demo", "--data-free", "--output", str(tmp_path), "--seeds", seed]) == 0
    out = capsys.readouterr().out
    for title, _, _ in runs.values():
        assert title in out
    students = tmp_path / "seed-1"
    assert (students / "made" / "synthetic" / "epoch-0001.png").read_bytes()[:4] == b"\x89PNG"
    page = (students / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "of that with data" in page
    assert main(["demo", "--data-free", "--output", str(tmp_path), "--seeds", "0", "1"]) == 2
