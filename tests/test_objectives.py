"""Objectives: parity with timm's tasks, the losses' infima, teachers that stay as they are."""

import argparse
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from dtokd.errors import UsageError
from dtokd.objectives.base import Objective, at_bound
from dtokd.objectives.build import build, weights_of
from dtokd.objectives.features import DISTANCES, Attention, attention_distance, normalise
from dtokd.objectives.logits import decoupled_kl, soft_kl
from dtokd.objectives.options import add_arguments
from dtokd.objectives.projectors import Householder, make_projector
from dtokd.objectives.review import hierarchical_context
from dtokd.objectives.taps import Outputs, Taps
from dtokd.objectives.task import DistillationTask
from dtokd.objectives.teacher import Normalisation, Teacher, as_list, choose_size
from safetensors.torch import save_file
from timm.models import register_model
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from torch import nn

import dtokd_kernels as dk

CLASSES = 5
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def options(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(a) for a in arguments])


def model(name="test_resnet", seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=kwargs.pop("num_classes", CLASSES), **kwargs)


def distilled(seed=0):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return model("deit_tiny_distilled_patch16_224", seed, **size)


def vit(seed=0):
    return model("test_vit", seed)  # takes any size


@register_model
def one_size_vit(pretrained=False, **kwargs):
    return timm.create_model("test_vit", img_size=64, dynamic_img_size=False, **kwargs)


@pytest.fixture
def weights(tmp_path):
    """Writes a model's weights where --kd-teacher-path reads them."""

    def write(module, name="teacher"):
        path = tmp_path / f"{name}.safetensors"
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path)
        return path

    return write


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])


def kd(path, *arguments, name="test_resnet"):
    return options("--kd-model-name", name, "--kd-teacher-path", path, *arguments)


WEIGHTS = [
    ([], {}),
    (["--task-loss-weight", 0.3], {"task_loss_weight": 0.3}),
    (["--distill-loss-weight", 2.0], {"distill_loss_weight": 2.0}),
    (
        ["--task-loss-weight", 0.7, "--distill-loss-weight", 0.2],
        {"task_loss_weight": 0.7, "distill_loss_weight": 0.2},
    ),
]


def test_weights_below_zero_are_refused():
    """With timm's rule that the teacher's weight is 1 minus the task's."""
    assert weights_of(options("--task-loss-weight", 1), ["kl"]) == (1.0, {"kl": 0.0})
    with pytest.raises(UsageError, match="--task-loss-weight: 3 alone leaves -2"):
        weights_of(options("--task-loss-weight", 3), ["kl"])
    assert weights_of(options("--task-loss-weight", 3, "--distill-loss-weight", 1), ["kl"]) == (3.0, {"kl": 1.0})


@pytest.mark.parametrize(("arguments", "keywords"), WEIGHTS)
@pytest.mark.parametrize("kind", ["logit", "feature", "token", "token-hard"])
def test_same_loss_and_gradients_as_timm(kind, arguments, keywords, weights, batch):
    teacher = model(seed=1)
    student = distilled() if kind.startswith("token") else model("test_efficientnet")
    ours, theirs = student, copy.deepcopy(student)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    chosen = ["--kd-distill-type", kind.removesuffix("-hard"), *arguments]
    if kind == "token-hard":
        chosen += ["--kd-token-distill-type", "hard"]
    torch.manual_seed(3)
    task = build(kd(weights(teacher), *chosen), ours, criterion, **CPU)
    torch.manual_seed(3)
    if kind == "logit":
        reference = LogitDistillationTask(theirs, teacher, criterion, temperature=4.0, verbose=False, **keywords)
    elif kind == "feature":
        reference = FeatureDistillationTask(theirs, teacher, criterion, verbose=False, **keywords)
        copied = reference.trainable_module.projection.state_dict()
        task.get_trainable_module().heads["feature"].map.load_state_dict(copied)
    else:
        soft = "hard" if kind == "token-hard" else "soft"
        reference = TokenDistillationTask(
            theirs, teacher, criterion, distill_type=soft, temperature=4.0, verbose=False, **keywords
        )
    task.train()
    reference.train()
    torch.manual_seed(4)
    got = task(*batch)
    torch.manual_seed(4)
    expected = reference(*batch)
    torch.testing.assert_close(got["loss"], expected["loss"])
    torch.testing.assert_close(got["output"], expected["output"])
    torch.testing.assert_close(got["objectives"]["task"], expected["task_loss"])
    got["loss"].backward()
    expected["loss"].backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_without_a_teacher_only_the_task(batch):
    student = model()
    expected = ClassificationTask(copy.deepcopy(student), nn.CrossEntropyLoss(), verbose=False).train()(*batch)
    result = build(options(), student, nn.CrossEntropyLoss(), **CPU).train()(*batch)
    assert list(result["objectives"]) == ["task"]
    torch.testing.assert_close(result["loss"], expected["loss"])


EVERY = ["logit", "feature", "multiscale", "attention", "review", "dkd"]


@pytest.mark.parametrize("pair", ["cnn-vit", "vit-cnn", "cnn-cnn"])
def test_every_objective_between_cnns_and_transformers(pair, weights, batch):
    student, teacher = [vit(s) if n == "vit" else model(seed=s) for s, n in enumerate(pair.split("-"))]
    name = "test_vit" if pair.endswith("vit") else "test_resnet"
    norm = ["--kd-stages", 2, "--kd-feature-norm", "layernorm"]
    chosen = kd(weights(teacher), "--kd-distill-type", *EVERY, *norm, name=name)
    task = build(chosen, student, nn.CrossEntropyLoss(), **CPU).train()
    result = task(*batch)
    assert list(result["objectives"]) == ["task", "kl", *EVERY[1:]]
    for objective, loss in result["objectives"].items():
        assert loss.ndim == 0, objective
        assert loss > 0, objective
        task.zero_grad()
        loss.backward(retain_graph=True)
        reached = [n for n, p in task.get_trainable_module().named_parameters() if p.grad is not None and p.grad.any()]
        assert any(n.startswith("student.") for n in reached), objective
        heads = {n.split(".")[1] for n in reached if n.startswith("heads.")}
        assert heads <= {objective}, f"{objective} reaches another objective's head"


VKD = ["--kd-distill-type", "token", "feature", "--kd-projector", "orthogonal", "--kd-feature-norm", "layernorm",
       "--kd-feature-loss", "smooth_l1", "--kd-feature-pool", "mean"]  # fmt: skip


def test_vkd_three_objectives_with_a_distilled_student(weights, batch):
    chosen = kd(weights(model(seed=1)), *VKD)
    student = distilled()
    task = build(chosen, student, nn.CrossEntropyLoss(), **CPU).train()
    result = task(*batch)
    assert list(result["objectives"]) == ["task", "token", "feature"]
    result["loss"].backward()
    # by hand, from the student's tokens
    with torch.no_grad():
        teacher, images = task.lessons[0][0].model, task.lessons[0][0].view(batch[0])
        tokens = student.forward_features(batch[0])[:, 2:].mean(1)
        features = F.layer_norm(teacher.forward_features(images).mean((2, 3)), (teacher.num_features,))
        projected = task.get_trainable_module().heads["feature"].map(tokens)
    torch.testing.assert_close(result["objectives"]["feature"], F.smooth_l1_loss(projected, features))
    student.eval()
    assert student(batch[0]).shape == (4, CLASSES), "evaluation averages the two heads"


@pytest.mark.parametrize("widths", [(8, 8), (4, 8), (8, 4)])
def test_orthogonal_projector_stays_orthogonal_in_training(widths):
    torch.manual_seed(0)
    projector = make_projector("orthogonal", *widths)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=0.1, weight_decay=0.05)
    before = projector.weight.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(projector(torch.randn(16, widths[0])), torch.randn(16, widths[1])).backward()
        optimizer.step()
    weight = projector.weight.detach()
    gram = weight @ weight.T if widths[0] > widths[1] else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(min(widths)), atol=1e-5, rtol=0)
    assert not torch.allclose(weight, before)


def test_reflections_at_once_are_those_one_by_one():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors = x.tril(-1)
    expected = torch.linalg.householder_product(vectors, 2 / (1 + vectors.square().sum(0)))
    torch.testing.assert_close(Householder()(x), expected)
    torch.testing.assert_close(Householder()(x.mT.contiguous().mT.mT).mT, Householder()(x))


def test_infima_are_zero_and_reached():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, CLASSES, generator=generator)
    maps = torch.randn(6, 8, 4, 4, generator=generator)
    target = torch.arange(6) % CLASSES
    zero = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(soft_kl(logits, logits, 4.0), torch.tensor(0.0), **zero)
    torch.testing.assert_close(decoupled_kl(logits, logits, target, 4.0, 1.0, 8.0), torch.tensor(0.0), **zero)
    torch.testing.assert_close(attention_distance(maps, 3 * maps), torch.tensor(0.0), **zero)
    torch.testing.assert_close(hierarchical_context(maps, maps), torch.tensor(0.0), **zero)
    assert soft_kl(logits, -logits, 4.0) > 0
    assert decoupled_kl(logits, -logits, target, 4.0, 1.0, 8.0) > 0


@pytest.mark.parametrize(("value", "left"), [(-1e-8, 1e-7), (0.0, 1e-7), (1e-3, 1e-3), (-1e-6, -1e-6), (-3.0, -3.0)])
def test_losses_at_their_bound_are_constants(value, left):
    """What is really negative stays, for the balance to refuse; NaN stays NaN."""
    w = torch.tensor(value, requires_grad=True)
    loss = at_bound(w)
    loss.backward()
    assert loss.item() == pytest.approx(left)
    assert w.grad == float(value == left)
    assert at_bound(torch.tensor(float("nan"))).isnan()


def test_divergences_do_not_round_below_zero():
    """Logits of hundreds that differ in their last bits: the sums round to either side of 0."""
    generator = torch.Generator().manual_seed(0)
    below = 0
    for _ in range(50):
        teacher = 300 * torch.randn(4, CLASSES, generator=generator)
        student = teacher * (1 + 2e-7 * torch.randn(4, CLASSES, generator=generator))
        logs = [(x / 4.0).log_softmax(-1) for x in (student, teacher)]
        below += bool(F.kl_div(*logs, reduction="batchmean", log_target=True) < 0)
        assert soft_kl(student, teacher, 4.0) >= 0
        assert decoupled_kl(student, teacher, torch.arange(4), 4.0, 1.0, 8.0) >= 0
        assert DISTANCES["cosine"](student, 3 * teacher) >= 0
    assert below


class Negative(Objective):
    """A loss without a lower bound."""

    def __init__(self):
        self.name, self.student, self.teacher = "negative", Taps(logits=True), Taps(logits=True)

    def loss(self, student, projected, teacher, target):
        return -student.logits.square().mean() - 1


def test_negative_loss_is_refused(weights, batch):
    """And not a constant with weight 0."""
    student = model()
    lessons = [(Teacher(model(seed=1), "teacher", Normalisation.of(student)), [Negative()])]
    task = DistillationTask(student, nn.CrossEntropyLoss(), lessons).train()
    losses = task(*batch)["objectives"]
    assert losses["negative"] < -1
    with pytest.raises(ValueError, match=r"losses\['negative'\] is -.*need a positive loss"):
        dk.backward(losses, student.parameters())


def test_negative_weight_of_dkd_is_no_rounding():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, CLASSES, generator=generator)
    assert decoupled_kl(student, teacher, torch.arange(4), 4.0, -1.0, 0.0) < -0.01


def test_decoupled_kl_is_kl_with_the_papers_weights():
    """Eq. 6: KL = TCKD + (1 - p_t) NCKD, sample by sample."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 1, CLASSES, generator=generator, dtype=torch.float64)
    target = torch.tensor([2])
    beta = 1 - (teacher / 2.0).softmax(-1)[0, 2].item()
    torch.testing.assert_close(decoupled_kl(student, teacher, target, 2.0, 1.0, beta), soft_kl(student, teacher, 2.0))


def test_attention_and_review_agree_with_torchdistill():
    losses = pytest.importorskip("torchdistill.losses.mid_level", reason="torchdistill is not installed")
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 3, 6, 8, 8, generator=generator)
    pair = {"pair": {"teacher": {"path": "x", "io": "output"}, "student": {"path": "x", "io": "output"}}}
    expected = losses.ATLoss(pair)({"x": {"output": student}}, {"x": {"output": teacher}})
    torch.testing.assert_close(attention_distance(student, teacher), expected)
    context = losses.HierarchicalContextLoss("x", "output", "x", "output")
    expected = context({"x": {"output": (student, None)}}, {"x": {"output": teacher}})
    torch.testing.assert_close(hierarchical_context(student, teacher), expected)


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 2, 2)])
def test_norms(shape):
    generator = torch.Generator().manual_seed(3)
    student, teacher = 5 + 2 * torch.randn(2, *shape, generator=generator)
    s, t = normalise(student, teacher, "layernorm")
    assert s is student
    torch.testing.assert_close(t.mean(1), torch.zeros_like(t.mean(1)), atol=1e-5, rtol=0)
    s, t = normalise(student, teacher, "standardize")
    rows = s.movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(rows.std(0, unbiased=False), torch.ones(3), atol=1e-4, rtol=0)
    dead = torch.zeros(shape)
    assert normalise(student, dead, "standardize")[1].isfinite().all()


def test_attention_sums_over_stages():
    generator = torch.Generator().manual_seed(4)
    s, t = torch.randn(2, 2, 3, 4, 4, generator=generator)
    one, two = [
        Attention("a", ((0,) * n, (0,) * n)).loss(Outputs(maps=(s,) * n), None, Outputs(maps=(t,) * n), torch.zeros(2))
        for n in (1, 2)
    ]
    torch.testing.assert_close(two, 2 * one)


# teachers


def test_the_teacher_stays_as_it_is_and_out_of_everything(weights, batch):
    task = build(kd(weights(model(seed=1)), "--kd-distill-type", "logit", "feature", "--kd-projector", "orthogonal"),
                 model(), nn.CrossEntropyLoss(), **CPU)  # fmt: skip
    teacher = task.lessons[0][0].model
    before = copy.deepcopy(teacher.state_dict())
    ema = task.setup_ema(decay=0.5)
    task.train()
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=1e-2)
    for _ in range(2):
        task(*batch)["loss"].backward()
        optimizer.step()
        task.update_ema()
    assert not teacher.training
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in teacher.parameters())
    own = {id(p) for p in teacher.parameters()}
    assert not own & {id(p) for p in task.parameters()}
    assert not own & {id(p) for p in ema.parameters()}
    student = model()
    assert set(task.get_checkpoint_state()["state_dict"]) == set(student.state_dict())
    assert set(task.get_checkpoint_state(ema=True)["state_dict_ema"]) == set(student.state_dict())
    assert set(task.get_task_state()) == {"heads"}


def test_state_of_the_heads_goes_and_comes(weights, batch):
    def fresh(seed):
        chosen, student = kd(weights(model(seed=1)), "--kd-distill-type", "feature"), model("test_efficientnet")
        torch.manual_seed(seed)
        return build(chosen, student, nn.CrossEntropyLoss(), **CPU).eval()

    first, second = fresh(1), fresh(2)
    assert first(*batch)["loss"] != second(*batch)["loss"]
    state = first.get_checkpoint_state()
    second.load_checkpoint_state(state["state_dict"], state["task_state"])
    assert first(*batch)["loss"] == second(*batch)["loss"]
    with pytest.raises(RuntimeError, match="Missing key"):
        second.load_checkpoint_state(state["state_dict"], {"heads": {}})


def test_another_size_and_normalisation(weights):
    teacher = model(seed=1)
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    student = Normalisation((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def normalised(norm, images):
        return (images - torch.tensor(norm[0]).view(3, 1, 1)) / torch.tensor(norm[1]).view(3, 1, 1)

    seen = Teacher(teacher, "t", student).view(normalised((student.mean, student.std), pixels))
    torch.testing.assert_close(seen, normalised(((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), pixels))
    resized = Teacher(teacher, "t", student, size=(32, 32)).view(normalised((student.mean, student.std), pixels))
    expected = F.interpolate(pixels, (32, 32), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(resized, normalised(((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), expected))
    same = torch.randn(1, 3, 8, 8)
    assert Teacher(teacher, "t", Normalisation.of(teacher)).view(same) is same


def test_only_teachers_of_one_size_get_it():
    assert choose_size(model(), None) is None
    assert choose_size(model("one_size_vit"), None) == (64, 64)
    assert choose_size(vit(), None) is None
    assert choose_size(model(), 64) == (64, 64)


def test_a_teacher_of_one_size_teaches_small_images(weights, batch):
    task = build(
        kd(weights(model("one_size_vit", 1)), name="one_size_vit"),
        model(),
        nn.CrossEntropyLoss(),
        **CPU,
    )
    assert task.train()(*batch)["objectives"]["kl"] > 0


def test_outputs_can_be_saved_for_backward_and_carry_no_graph(batch):
    teacher = Teacher(model(), "t", Normalisation(), dtype=torch.bfloat16)
    outputs = teacher(batch[0], Taps(logits=True, pooled="head", stages=(3, 4)))
    for tensor in (outputs.logits, outputs.pooled, *outputs.maps):
        assert not tensor.is_inference()
        assert not tensor.requires_grad
        assert tensor.dtype == torch.float32
    exact = Teacher(model(), "t", Normalisation())(batch[0], Taps(logits=True)).logits
    assert not torch.equal(outputs.logits, exact), "bfloat16 made no difference"
    torch.testing.assert_close(outputs.logits, exact, atol=0.05, rtol=0.05)


def test_compiled_teacher(batch):
    torch.compiler.reset()
    plain = Teacher(model(), "t", Normalisation())
    compiled = Teacher(model(), "t", Normalisation(), compile=False)
    compiled._read = torch.compile(compiled._read, backend="eager")
    taps = Taps(logits=True, pooled="head")
    for got, expected in zip(compiled(batch[0], taps)[:3:2], plain(batch[0], taps)[:3:2], strict=True):
        torch.testing.assert_close(got, expected)


def test_several_teachers(weights, batch):
    paths = [weights(model(seed=s), f"t{s}") for s in (1, 2)] + [weights(model("test_efficientnet", 3), "t3")]
    chosen = options("--kd-model-name", "test_resnet", "test_resnet", "test_efficientnet", "--kd-teacher-path", *paths,
                     "--kd-distill-type", "logit", "feature", "--distill-loss-weight", 1, 2, 3, 4, 5, 6)  # fmt: skip
    result = build(chosen, model(), nn.CrossEntropyLoss(), **CPU).train()(*batch)
    names = [
        f"{kind}_{t}" for t in ("test_resnet_1", "test_resnet_2", "test_efficientnet") for kind in ("kl", "feature")
    ]
    assert list(result["objectives"]) == ["task", *names]
    losses = list(result["objectives"].values())
    torch.testing.assert_close(
        result["loss"], sum(w * loss for w, loss in zip([1, 1, 2, 3, 4, 5, 6], losses, strict=True))
    )


def test_inputs_that_do_not_fit(weights, tmp_path):
    path = weights(model(seed=1))
    broken = tmp_path / "broken.pth"
    torch.save({"weights": print}, broken)
    cases = [
        (kd(weights(model(num_classes=7), "seven")), model(), "5 classes.* 7.*--num-classes"),
        (kd(path, name="test_efficientnet"), model(), "does not hold weights of 'test_efficientnet'"),
        (kd(tmp_path / "none.safetensors"), model(), "there is no file"),
        (kd(broken), model(), "without running pickled code"),
        (kd(path, "--kd-distill-type", "token"), model(), "no distillation head"),
        (kd(path, "--kd-distill-type", "logit", "logit"), model(), "pass different ones"),
        (kd(path, "--distill-loss-weight", 1, 2), model(), "got 2 for the objectives kl"),
        (kd(path, "--kd-distill-type", "attention", "--kd-stages", 9), model(), "--kd-stages: got 9"),
        (
            kd(path, "--kd-distill-type", "review", "--kd-teacher-stages", 1),
            model(),
            "3 stages against 1",
        ),
        (options("--kd-teacher-path", path), model(), "there is no teacher"),
        (options("--kd-model-name", "a", "b", "--kd-teacher-path", path), model(), "1 files for 2"),
        (options("--kd-model-name", "no_such_model"), model(), "no_such_model"),
    ]
    for chosen, student, message in cases:
        with pytest.raises(UsageError, match=message):
            build(chosen, student, nn.CrossEntropyLoss(), **CPU)
    dense = kd(path, "--kd-cache-teacher", tmp_path, "--kd-distill-type", "logit", "attention")
    with pytest.raises(UsageError, match="feature maps and tokens take too much room"):
        build(dense, model(), nn.CrossEntropyLoss(), **CPU)


def test_a_teacher_of_other_classes_may_teach_features(weights, batch):
    task = build(
        kd(weights(model(num_classes=7)), "--kd-distill-type", "feature"), model(), nn.CrossEntropyLoss(), **CPU
    )
    assert task.train()(*batch)["objectives"]["feature"] > 0


def test_soft_targets_have_no_target_class(weights, batch):
    task = build(kd(weights(model(seed=1)), "--kd-distill-type", "dkd"), model(), nn.CrossEntropyLoss(), **CPU).train()
    with pytest.raises(UsageError, match="--mixup"):
        task(batch[0], torch.full((4, CLASSES), 0.2))


def test_one_value_of_a_config_file_is_a_list_of_one():
    assert as_list("resnet50") == ["resnet50"]
    assert as_list(None) == []
    assert as_list(2.0) == [2.0]


def test_a_teacher_of_grey_images_is_shown_grey_images():
    """timm's configuration has three numbers, of which its loaders take the mean."""
    model = timm.create_model("test_resnet", in_chans=1)
    mean, std = (sum(model.pretrained_cfg[name]) / 3 for name in ("mean", "std"))
    student = Normalisation((0.5,), (0.25,))
    pixels = torch.rand(2, 1, 8, 8)
    seen = Teacher(model, "t", student).view((pixels - 0.5) / 0.25)
    torch.testing.assert_close(seen, (pixels - mean) / std)
