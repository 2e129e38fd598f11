"""RKD, DIST, CRD, standardised logits, LightlyTrain's pseudo-classes: against plain code, and in runs that resume."""

import itertools
import math

import numpy as np
import pytest
import timm
import torch
from dtokd.cli import main
from dtokd.objectives.logits import Dist, Standardised
from dtokd.objectives.memory import Queue
from dtokd.objectives.relations import Contrastive, PseudoClass, Relational
from dtokd.objectives.taps import Outputs
from safetensors.torch import load_file, save_file

from .digits import common, distilling, write_digits, write_teacher

pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def softmax(row):
    powers = [math.exp(x - max(row)) for x in row]
    return [p / sum(powers) for p in powers]


def divergence(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a)


def huber(a, b):
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def unit(row):
    row = np.asarray(row, dtype=np.float64)
    return row / np.linalg.norm(row)


def test_rkd():
    """Park et al., Eq. 5 to 9, sample by sample."""
    student, teacher = randn(5, 3), 3 * randn(5, 7, seed=1)
    total = 0.0
    rows = [x.double().numpy() for x in (student, teacher)]
    means = [np.mean([np.linalg.norm(x[i] - x[j]) for i, j in itertools.permutations(range(5), 2)]) for x in rows]
    for i, j in itertools.product(range(5), repeat=2):
        total += 25 / 25 * huber(*(np.linalg.norm(x[i] - x[j]) / m for x, m in zip(rows, means, strict=True)))
    for i, j, k in itertools.product(range(5), repeat=3):
        if j not in (i, k):
            total += 50 / 125 * huber(*(unit(x[i] - x[j]) @ unit(x[k] - x[j]) for x in rows))
    found = Relational("rkd", "head").loss(Outputs(pooled=student), None, Outputs(pooled=teacher), None)
    assert found.item() == pytest.approx(total, rel=1e-5)


def test_rkd_sees_neither_rotation_nor_scale_nor_small_batches():
    teacher = randn(6, 4)
    turned = 3 * teacher @ torch.linalg.qr(randn(4, 4, seed=1)).Q + 2
    rkd = Relational("rkd", "head")

    def loss(student, teacher):
        return rkd.loss(Outputs(pooled=student), None, Outputs(pooled=teacher), None)

    assert loss(turned, teacher).item() == pytest.approx(0, abs=1e-9)
    for rows in (1, 2):
        assert loss(randn(rows, 4), teacher[:rows]).item() == pytest.approx(0, abs=1e-9)
    twice = torch.cat([teacher, teacher]).requires_grad_()  # distances of 0
    loss(twice, randn(12, 4, seed=2)).backward()
    assert twice.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist(temperature):
    """Huang et al., Eq. 8 and 9, with numpy's correlation."""
    student, teacher = randn(4, 6), randn(4, 6, seed=1)
    s, t = (np.array([softmax((row / temperature).tolist()) for row in x]) for x in (student, teacher))
    inter = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    intra = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    dist = Dist("dist", temperature)
    found = dist.loss(Outputs(student), None, Outputs(teacher), None)
    assert found.item() == pytest.approx((inter + intra) * temperature**2, rel=1e-5)
    assert 0 <= dist.loss(Outputs(teacher), None, Outputs(teacher), None) < 1e-5


def test_standardised_logits():
    """Sun et al., Algorithm 1; the student's scale and shift do not matter."""
    student, teacher = randn(4, 6), 5 * randn(4, 6, seed=1) + 3

    def standard(row):
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))
        return [(x - mean) / deviation / 2 for x in row]

    pairs = zip(student.tolist(), teacher.tolist(), strict=True)
    plain = 4 * sum(divergence(softmax(standard(t)), softmax(standard(s))) for s, t in pairs) / 4
    loss = Standardised("kl_std", 2.0)
    assert loss.loss(Outputs(student), None, Outputs(teacher), None).item() == pytest.approx(plain, rel=1e-5)
    assert loss.loss(Outputs(teacher / 7 - 1), None, Outputs(teacher), None).item() == pytest.approx(0, abs=1e-5)
    flat = torch.zeros(2, 3, requires_grad=True)  # without a deviation
    loss.loss(Outputs(flat), None, Outputs(teacher[:2, :3]), None).backward()
    assert flat.grad.isfinite().all()


def test_contrast():
    """InfoNCE over the batch, sample by sample."""
    own, teacher = randn(4, 5), randn(4, 5, seed=1)
    plain = 0.0
    for i in range(4):
        logits = [unit(own[i]) @ unit(teacher[k]) / 0.1 for k in range(4)]
        plain -= math.log(softmax(logits)[i]) / 4
    crd = Contrastive("crd", "linear", (5, 5), "head", 0.1)
    assert crd.loss(Outputs(), own, Outputs(pooled=teacher), None).item() == pytest.approx(plain, rel=1e-5)


def test_queue_keeps_the_newest():
    queue = Queue(5, 2)
    assert not queue.taken.any()
    first, second = randn(3, 2), randn(4, 2, seed=1)
    queue.push(first)
    assert queue.taken.tolist() == [True] * 3 + [False] * 2
    queue.push(second)
    expected = [unit(row) for row in (*second, first[0])]
    np.testing.assert_allclose(queue.rows, expected, rtol=1e-6)
    queue.push(randn(9, 2, seed=2))
    np.testing.assert_allclose(queue.rows, [unit(row) for row in randn(9, 2, seed=2)[:5]], rtol=1e-6)


def test_pseudo_classes():
    """LightlyTrain's global and local parts, sample by sample and place by place; empty places are no class."""
    torch.manual_seed(0)
    made = PseudoClass("p", "linear", (3, 4), (3, 4), (2, 5), "head", 6, 0.07)
    earlier, pooled, maps = randn(2, 4, seed=3), randn(2, 4, seed=4), randn(2, 4, 2, 2, seed=5)
    teacher = Outputs(pooled=pooled, maps=(maps,))
    made.remember(Outputs(pooled=earlier, maps=(maps,)))
    made.remember(teacher)
    student = Outputs(pooled=randn(2, 3, seed=6), maps=(randn(2, 3, 2, 2, seed=7),))
    projected = made.head(student)
    queue = [*pooled, *earlier]
    total = 0.0
    with torch.no_grad():
        for i in range(2):
            own = made.head.pooled.map(student.pooled[i])
            p, q = (softmax([unit(x) @ unit(row) / 0.07 for row in queue]) for x in (pooled[i], own))
            total += divergence(p, q) / 2
            places = [(y, x) for y in range(2) for x in range(2)]
            theirs = [unit(maps[i, :, y, x]) for y, x in places]
            ours = [unit(made.head.map(student.maps[0][i, :, y, x])) for y, x in places]
            for place in range(4):
                p, q = (softmax([f[place] @ other / 0.07 for other in f]) for f in (theirs, ours))
                total += divergence(p, q) / 8
    assert made.loss(student, projected, teacher, None).item() == pytest.approx(total, rel=1e-4)
    same = made.loss(student, (pooled, maps), teacher, None)
    assert same.item() == pytest.approx(0, abs=1e-5)
    # another grid is resized to the teacher's
    larger = Outputs(pooled=student.pooled, maps=(randn(2, 3, 5, 5),))
    made.loss(larger, made.head(larger), teacher, None).backward()
    assert all(p.grad.isfinite().all() for p in made.head.parameters())
    # before training the queue is empty
    fresh = PseudoClass("p", "linear", (3, 4), (3, 4), (2, 5), "head", 6, 0.07)
    assert fresh.loss(student, (pooled, maps), teacher, None).item() == pytest.approx(0, abs=1e-5)


TYPES = ["logit-std", "dist", "rkd", "crd", "pseudo-class", "feature"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    return write_digits(root / "data"), write_teacher(root / "teacher.safetensors")


@pytest.mark.parametrize("amp", [[], ["--amp", "--amp-dtype", "bfloat16"]])
def test_a_resumed_run_is_the_undisturbed_one(digits, tmp_path, amp):
    """Queue and statistics are part of the checkpoint: a run of all types goes on to the same bits."""
    data, teacher = digits
    options = [*common(data, tmp_path), *distilling(teacher), "--kd-distill-type", *TYPES, "--kd-queue-size", "24"]
    options += ["--kd-feature-norm", "phi-s", *amp]
    assert main(["train", *options, "--experiment", "whole"]) == 0
    whole = load_file(tmp_path / "whole" / "checkpoints" / "epoch-0002.safetensors")
    first = tmp_path / "whole" / "checkpoints" / "epoch-0001.safetensors"
    assert main(["train", *options, "--experiment", "again", "--resume", str(first)]) == 0
    again = load_file(tmp_path / "again" / "checkpoints" / "epoch-0002.safetensors")
    kept = [name for name in whole if ".memories." in name]
    assert {name.split(".")[2] for name in kept} == {"pseudo_class", "feature"}
    assert whole["weights.memories.pseudo_class.taken"].all()
    assert whole["weights.memories.feature.known"]
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_stored_outputs_of_the_teacher_serve_them(digits, tmp_path, capsys):
    """What the teacher has once told gives the same bits, statistics included, in a run that does not load it."""
    data, teacher = digits
    options = [*common(data, tmp_path), *distilling(teacher), "--kd-cache-teacher", str(tmp_path / "cache")]
    options += ["--kd-distill-type", "logit-std", "dist", "rkd", "crd", "feature", "--kd-feature-norm", "phi-s"]
    weights = []
    for name in ("writes", "reads"):
        assert main(["train", *options, "--experiment", name]) == 0
        weights.append(load_file(tmp_path / name / "checkpoints" / "epoch-0002.safetensors"))
    assert "the teacher is not needed" in capsys.readouterr().out
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert main(["train", *options, "--kd-distill-type", "pseudo-class", "--experiment", "x"]) == 2
    assert "--kd-cache-teacher" in capsys.readouterr().err


def test_stored_outputs_for_images_of_another_size(digits, tmp_path, capsys):
    """A transformer that is read for its features alone sees its own size; with its logits it had the student's."""
    data, _ = digits
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit", num_classes=10).state_dict(), tmp_path / "vit.safetensors")
    options = [
        *common(data, tmp_path),
        "--kd-model-name",
        "test_vit",
        "--kd-teacher-path",
        tmp_path / "vit.safetensors",
    ]
    options += ["--kd-cache-teacher", tmp_path / "cache", "--epochs", "1", "--kd-distill-type", "feature"]
    options = ["train", *map(str, options)]
    assert main([*options, "logit"]) == 0
    assert main(options) == 2
    assert "for images of the student's size, but this run needs those for 160 x 160" in capsys.readouterr().err
    assert main([*options, "--kd-teacher-img-size", "student"]) == 2
    assert "--kd-teacher-img-size was None, is now student" in capsys.readouterr().err
