"""timm's foundation models as teachers of classifiers and detectors: what they see, what is read, what is refused."""

import argparse

import numpy as np
import pytest
import timm
import torch
import transformers
from dtokd import recipes
from dtokd.cli import main
from dtokd.detect import options as detect_options
from dtokd.detect.build import build as build_detection
from dtokd.detect.build import pair_levels
from dtokd.detect.detectors import rtdetr
from dtokd.detect.detectors.dense import Dense, make_backbone
from dtokd.detect.detectors.hf import HFDetector
from dtokd.errors import UsageError
from dtokd.objectives.build import build
from dtokd.objectives.phi import Phi, PhiS, hadamard
from dtokd.objectives.taps import Taps
from dtokd.objectives.teacher import Normalisation, Teacher, choose_size, patch_of
from dtokd.train import options as train_options
from dtokd.train.reading import read_config
from dtokd.values import parser_of
from safetensors.torch import load_file, save_file
from timm.models import register_model
from torch import nn

from .coco import FCOS, common, write_coco
from .test_detect import KWARGS, configuration, images, targets, vidt

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
#: The true architectures, with fewer and narrower layers, and the size that each is made for or trained at.
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
TEACHERS = {
    "vit_small_patch16_dinov3": (SMALL, 256),
    "vit_small_patch14_reg4_dinov2": ({**SMALL, "img_size": 56}, 56),
    "vit_base_patch16_siglip_224": ({**SMALL, "img_size": 64}, 64),
    "eva02_tiny_patch14_224": ({**SMALL, "img_size": 56}, 56),
    "convnext_tiny": ({"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, None),
}


@register_model
def tokens_without_grid(pretrained=False, **kwargs):
    """A model whose features have no place in an image."""
    model = timm.create_model("test_vit", **kwargs)
    found = model.forward_intermediates

    def flat(*args, **named):
        features, maps = found(*args, **named)
        return features, [m.flatten(2).mT for m in maps]

    model.forward_intermediates = flat
    return model


@register_model
def other_widths(pretrained=False, **kwargs):
    """A model whose maps have other channels than it says."""
    model = timm.create_model("test_vit", **kwargs)
    model.feature_info = [{**info, "num_chs": 48} for info in model.feature_info]
    return model


@pytest.fixture
def weights(tmp_path):
    """Writes random weights of a model without classes where --kd-teacher-path reads them."""

    def write(name, arguments, seed=1, **more):
        torch.manual_seed(seed)
        model = timm.create_model(name, **{"num_classes": 0, **arguments, **more})
        path = tmp_path / f"{name}.safetensors"
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        return str(path)

    return write


def namespace(module, *arguments, **changes):
    return argparse.Namespace(**{**vars(parser_of(module).parse_args([str(a) for a in arguments])), **changes})


def student(name="test_resnet", classes=5):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=classes)


@pytest.mark.parametrize("name", TEACHERS)
def test_any_model_teaches_a_classifier(name, weights):
    """At its own size and in its own normalisation, without a head; its maps are its patch tokens alone."""
    arguments, size = TEACHERS[name]
    options = namespace(train_options, "--kd-model-name", name, "--kd-teacher-path", weights(name, arguments),
                        "--kd-distill-type", "feature", "multiscale", "--kd-stages", 1,
                        "--kd-feature-norm", "phi-s", kd_model_kwargs=arguments)  # fmt: skip
    task = build(options, student(), nn.CrossEntropyLoss(), **CPU)
    batch = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    task.check(batch)
    ((teacher, _),) = task.lessons
    cfg, own = teacher.model.pretrained_cfg, timm.create_model("test_resnet").pretrained_cfg
    seen = teacher.view(batch)
    assert tuple(seen.shape[-2:]) == (size or 32,) * 2
    mean, std, mean_t, std_t = (torch.tensor(c[k]).view(3, 1, 1) for c in (own, cfg) for k in ("mean", "std"))
    pixels = nn.functional.interpolate(batch, seen.shape[-2:], mode="bicubic", antialias=True) * std + mean
    torch.testing.assert_close(seen, (pixels - mean_t) / std_t)
    found = teacher(batch, Taps(pooled="mean", stages=(len(teacher.model.feature_info) - 1,)))
    with torch.no_grad():
        features = teacher.model.forward_features(seen)
    if name != "convnext_tiny":
        features = features[:, teacher.model.num_prefix_tokens :]
        side = size // teacher.model.patch_embed.patch_size[0]
        assert features.shape[1] == side**2
        torch.testing.assert_close(found.pooled, features.mean(1))
        features = features.mT.unflatten(-1, (side, side))
    torch.testing.assert_close(found.maps[-1], features)
    result = task.train()(batch, torch.arange(3))
    assert list(result["objectives"]) == ["task", "feature", "multiscale"]
    result["loss"].backward()
    assert all(p.grad is not None for p in task.get_eval_model().parameters())


def test_sizes():
    dinov3, siglip = (timm.create_model(n, num_classes=0, **TEACHERS[n][0]) for n in list(TEACHERS)[:3:2])
    assert [choose_size(dinov3, None, features=f) for f in (True, False)] == [(256, 256), None]
    assert [choose_size(dinov3, o, features=True) for o in ("own", "student", 96)] == [(256, 256), None, (96, 96)]
    assert [choose_size(siglip, o) for o in (None, "own", "student")] == [(64, 64)] * 3
    assert choose_size(student(), "own") == (160, 160)
    assert choose_size(student(), None, features=True) is None
    with pytest.raises(ValueError, match="own: Identity does not name"):
        choose_size(nn.Identity(), "own")
    # of a size that the student may have, but not the patches
    assert (patch_of(dinov3), patch_of(student())) == (16, 1)
    teacher = Teacher(dinov3, "t", Normalisation.of(dinov3), multiple=patch_of(dinov3))
    assert teacher.view(torch.zeros(1, 3, 70, 39)).shape == (1, 3, 64, 32)
    assert teacher.view(torch.zeros(1, 3, 7, 64)).shape == (1, 3, 16, 64)


def test_teachers_of_several_kinds(weights):
    """A classifier of the data's classes, one of others, and a model without classes: each gives what it can."""
    classifier, other = (weights(name, {}, num_classes=n) for name, n in (("test_resnet", 5), ("test_vit", 7)))
    chosen = ["--kd-model-name", "test_resnet", "test_vit", "--kd-teacher-path", classifier, other]
    batch = torch.randn(2, 3, 32, 32), torch.tensor([0, 4])
    options = namespace(train_options, *chosen, "--kd-distill-type", "logit", "multiscale")
    task = build(options, student(), nn.CrossEntropyLoss(), **CPU)
    assert list(task.train()(*batch)["objectives"]) == [
        "task", "kl_test_resnet", "multiscale_test_resnet", "multiscale_test_vit",
    ]  # fmt: skip
    cases = [
        (chosen, ["logit"], r"logit: the student has 5 classes, the teacher 'test_vit' 7"),
        (["--kd-model-name", "test_vit", "--kd-teacher-path", other], ["dist", "feature"], "dist: the student has 5"),
        (["--kd-model-name", "test_vit", "test_vit", "--kd-teacher-path", other, other], ["logit", "rkd"],
         "logit: no teacher has the student's 5 classes"),
        (["--kd-model-name", "tokens_without_grid", "--kd-teacher-path", weights("tokens_without_grid", {})],
         ["multiscale"], "are on no grid; take --kd-distill-type feature"),
        (["--kd-model-name", "other_widths", "--kd-teacher-path", weights("other_widths", {})],
         ["multiscale"], "cannot be brought to the student's: it gives 64 channels where it names 48"),
    ]  # fmt: skip
    for names, types, message in cases:
        with pytest.raises(ValueError, match=message):
            build(
                namespace(train_options, *names, "--kd-distill-type", *types), student(), nn.CrossEntropyLoss(), **CPU
            ).check(batch[0])


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 48, 192, 320, 384, 768, 1152, 1408])
def test_hadamard(order):
    found = hadamard(order).float()
    assert (found.abs() == 1).all()
    assert torch.equal(found @ found.mT, order * torch.eye(order))


def test_phi_standardisation():
    """Against numpy: mean 0, the same variance 1 in each channel, and distances that keep their ratios."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(400, 12)) @ generator.normal(size=(12, 12)) * np.logspace(-1, 2, 12) + 5
    phi = Phi(12)
    features = torch.tensor(rows, dtype=torch.float32)
    for part in (features[:100], features[100:].view(3, 10, 10, 12).movedim(-1, 1)):
        phi.observe(part)
    phi.settle()
    found = phi(features).double().numpy()
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(found.var(0), 1, rtol=1e-4)
    scale = np.sqrt(np.cov(rows.T, bias=True).trace() / 12)
    expected = np.linalg.norm(rows[:5, None] - rows[None, :5], axis=-1) / scale
    np.testing.assert_allclose(np.linalg.norm(found[:5, None] - found[None, :5], axis=-1), expected, rtol=1e-4)
    maps = features.view(4, 10, 10, 12).movedim(-1, 1)
    torch.testing.assert_close(phi(maps).movedim(1, -1).reshape(400, 12), phi(features))
    for width in (6, 92):
        with pytest.raises(ValueError, match=f"Hadamard matrix of the teacher's {width} channels"):
            Phi(width)
    constant = PhiS([4])
    constant.observe([torch.ones(8, 4)])
    with pytest.raises(ValueError, match="the same for all images"):
        constant.settle()


def test_scales_of_teachers_are_comparable(weights):
    """One teacher's features are 100 times the other's: with phi-s a student that gives zeros has the loss 1."""
    paths = [weights("test_resnet", {}), weights("test_efficientnet", {})]
    losses = {}
    batches = [torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    for norm in ("none", "phi-s"):
        options = namespace(train_options, "--kd-model-name", "test_resnet", "test_efficientnet", "--kd-teacher-path",
                            *paths, "--kd-distill-type", "feature", "--kd-feature-norm", norm)  # fmt: skip
        task = build(options, student("test_vit"), nn.CrossEntropyLoss(), **CPU).train()
        for (teacher, _), factor in zip(task.lessons, (1.0, 100.0), strict=True):
            read = teacher._read
            teacher._read = lambda *a, read=read, factor=factor: read(*a).each(lambda x: x * factor)
        for batch in batches:
            task.observe(batch)
        task.settle()
        assert task.settled
        for head in task.get_trainable_module().heads.parameters():
            head.data.zero_()
        with torch.no_grad():
            found = [task(batch, torch.zeros(16, dtype=torch.long))["objectives"] for batch in batches]
        losses[norm] = [sum(float(f[name]) for f in found) / 3 for name in found[0] if name != "task"]
    assert losses["phi-s"] == pytest.approx([1, 1], rel=1e-3)
    assert losses["none"][1] / losses["none"][0] > 10


# Detectors


def detector(kind):
    torch.manual_seed(0)
    if kind == "vidt":
        return vidt()
    if kind in ("fcos", "retinanet"):
        return Dense(kind, make_backbone("test_resnet", {}, None), 3, width=32)
    if kind == "rtdetr":
        return rtdetr.make("test_resnet", make_backbone("test_resnet", {}, None), 3, RTDETR)
    return HFDetector(transformers.AutoModelForObjectDetection.from_config(configuration(kind)))


RTDETR = {
    **{"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_layers": 2, "num_queries": 7},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_denoising": 4},
}


#: Names and arguments of two teachers.
PAIR = [("test_vit", {}), ("test_resnet", {})]


def annotations():
    return argparse.Namespace(categories={1: "a", 2: "b", 3: "c"}, most=3, path="x.json")


def detection_task(kind, *arguments, **changes):
    options = namespace(detect_options, "--img-size", 64, *arguments, **changes)
    own = detector(kind)
    return own, build_detection(options, own, annotations(), None, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["fcos", "retinanet", "rtdetr", "vidt", "detr", "d_fine", "yolos"])
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "convnext_tiny"])
def test_any_model_teaches_a_detector(kind, name, weights):
    arguments, _ = TEACHERS[name]
    path = weights(name, arguments)
    own, task = detection_task(kind, "--kd-model-name", name, "--kd-teacher-path", path,
                               "--kd-feature-norm", "phi-s", kd_model_kwargs=arguments)  # fmt: skip
    result = task.train()(images(), targets())
    assert list(result["objectives"]) == ["task", "feature"]
    result["objectives"]["feature"].backward()
    assert any(p.grad is not None and p.grad.any() for p in own.parameters())


def test_what_a_detectors_teacher_sees():
    """The student's pixels, padding in the teacher's mean color, at the nearest size of whole patches."""
    model = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, dynamic_img_size=True, **SMALL)
    teacher = Teacher(model, "t", Normalisation((0.0,) * 3, (1.0,) * 3), multiple=16)
    batch = images()
    seen = teacher.view(batch)
    torch.testing.assert_close(seen, (batch.pixels - 0.5) / 0.5 * batch.mask[:, None])
    teacher.multiple = 40
    assert teacher.view(batch).shape[-2:] == (80, 80)


def test_levels_are_paired_with_maps():
    """The coarsest level that is as fine as the map; the deepest map for each level."""
    options = argparse.Namespace(kd_student_stages=None, kd_teacher_stages=None)
    fcos = [(n, n) for n in (32, 16, 8, 4, 2)]
    assert pair_levels(options, fcos, [(16, 16)] * 12) == [(1, 11)]
    assert pair_levels(options, fcos, [(64, 64), (32, 32), (16, 16), (8, 8)]) == [(0, 1), (1, 2), (2, 3)]
    assert pair_levels(options, fcos, [(14, 14)]) == [(1, 0)]
    options.kd_student_stages = [0, 2]
    assert pair_levels(options, fcos, [(16, 16)] * 12) == [(0, 11)]
    options.kd_teacher_stages = [5, 11]
    assert pair_levels(options, fcos, [(16, 16)] * 2) == [(0, 0), (2, 1)]
    with pytest.raises(UsageError, match="2 levels against 3 maps"):
        pair_levels(options, fcos, [(16, 16)] * 3)
    options.kd_student_stages = [0, 5]
    with pytest.raises(UsageError, match="levels 0 to 4"):
        pair_levels(options, fcos, [(16, 16)] * 2)


def test_a_detector_and_models_teach_together(weights, tmp_path):
    """Queries are matched with the detector's; each model has its features, in a scale of its own."""
    path = tmp_path / "vidt.safetensors"
    save_file({k: v.clone() for k, v in vidt(7).state_dict().items()}, path)
    names = ["vidt_nano", "test_vit", "test_resnet"]
    chosen = ["--kd-model-name", *names, "--kd-teacher-path", path, weights("test_vit", {}), weights("test_resnet", {})]
    more = ["--kd-distill-type", "prediction", "feature", "--kd-match", "hungarian"]
    with pytest.MonkeyPatch.context() as patch:
        from dtokd.detect import build as module

        made = module.make_teacher
        patch.setattr(
            module, "make_teacher", lambda o, *a: made(argparse.Namespace(**{**vars(o), "kd_model_kwargs": KWARGS}), *a)
        )
        _, task = detection_task("vidt", *chosen, *more)
    result = task.train()(images(), targets())
    assert list(result["objectives"]) == [
        "task", "prediction_vidt_nano", "feature_vidt_nano", "feature_test_vit", "feature_test_resnet",
    ]  # fmt: skip
    assert all(float(loss.detach()) > 0 for loss in result["objectives"].values())


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("--kd-model-name nothing", "'nothing' is neither a detector .* nor one of timm's models"),
        ("--kd-model-name test_vit --kd-distill-type token", "token: test_vit is no detector"),
        ("--kd-model-name fcos:a fcos:b", "are detectors; pass one at most"),
        ("--kd-model-name test_vit --kd-share-queries --kd-teacher-path {vit}", "--kd-share-queries: test_vit is no"),
        ("--kd-model-name test_vit --kd-teacher-path a b", "2 files for 1 teachers"),
        ("--kd-model-name tokens_without_grid --kd-teacher-path {vit}", "which are on no grid"),
        ("--kd-model-name test_vit --kd-teacher-path {vit} --kd-student-stages 7", "levels 0 to 4"),
        ("--kd-model-name test_vit --kd-teacher-path {vit} --kd-teacher-stages 99", "stages 0 to 5"),
        ("--kd-model-name test_vit --kd-teacher-path {resnet}", "does not hold weights of 'test_vit'"),
        (
            "--kd-model-name test_vit --kd-teacher-path {vit} --kd-teacher-img-size 20",
            "does not take the student's images",
        ),
    ],
)
def test_bad_teachers_of_detectors(texts, message, weights):
    paths = {"vit": weights("test_vit", {}), "resnet": weights("test_resnet", {})}
    with pytest.raises(UsageError, match=message):
        detection_task("fcos", *texts.format(**paths).split())


def test_a_detectors_run_goes_on_to_the_same_bits(weights, tmp_path):
    """With two models as teachers: their statistics are part of the checkpoint."""
    data = write_coco(tmp_path / "coco")
    options = [*common(data, tmp_path), *FCOS, "--pictures", "0", "--val-split", "", "--kd-feature-norm", "phi-s"]
    options += [
        "--kd-model-name",
        "test_vit",
        "test_resnet",
        "--kd-teacher-path",
        *map(weights, *zip(*PAIR, strict=True)),
    ]
    assert main(["detect", *options, "--experiment", "whole"]) == 0
    first, second = (tmp_path / "whole" / "checkpoints" / f"epoch-000{n}.safetensors" for n in (1, 2))
    assert main(["detect", *options, "--experiment", "again", "--resume", str(first)]) == 0
    whole, again = load_file(second), load_file(tmp_path / "again" / "checkpoints" / second.name)
    assert {n.split(".")[2] for n in whole if ".memories." in n} == {"feature_test_vit", "feature_test_resnet"}
    assert whole["weights.memories.feature_test_vit.known"]
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


# Recipes

RECIPES = {
    "train": [n for n in recipes.names() if n.startswith("dinov3/")],
    "detect": [n for n in recipes.names() if n.startswith("coco_dinov3/")],
}


def recipe(command, name, **changes):
    parser = parser_of({"train": train_options, "detect": detect_options}[command])
    given = read_config(parser, f"recipe:{name}")
    return argparse.Namespace(**{**vars(parser.parse_args([])), **given, **changes})


def test_recipes_name_models():
    assert (len(RECIPES["train"]), len(RECIPES["detect"])) == (4 * 4, 4 * 3)
    for command, names in RECIPES.items():
        for name in names:
            options = recipe(command, name)
            if not name.endswith("/none"):
                (teacher,) = options.kd_model_name
                assert timm.is_model_pretrained(teacher)
                assert f"dinov3_{teacher.split('_')[1]}-" in name
            backbone = options.model.rpartition(":")[2]
            assert timm.is_model_pretrained(backbone) or not getattr(options, "pretrained", False)
            assert options.batch_size * options.grad_accum_steps in (16, 1024)
            assert options.kd_balance == ("dto" if name.endswith("/dto") else "none")


@pytest.mark.parametrize("name", [n for n in RECIPES["train"] if n.endswith(("/dto", "small-resnet50/pseudo"))])
def test_recipe_of_a_classifier_steps(name, weights):
    """The true architectures with one block and random weights; variants differ in options that other tests take."""
    options = recipe("train", name)
    (teacher,) = options.kd_model_name
    architecture = teacher.split(".")[0]
    arguments = {"depth": 1}
    options.kd_model_kwargs, options.kd_teacher_path = arguments, [weights(architecture, arguments)]
    options.kd_queue_size = 16
    torch.manual_seed(0)
    less = {"depth": 1} if "vit" in options.model else {"layers": (1, 1, 1, 1)}
    own = timm.create_model(options.model, num_classes=10, **less)
    task = build(options, own, nn.CrossEntropyLoss(), **CPU).train()
    ((made, objectives),) = task.lessons
    assert made.size == (256, 256)
    assert made.dtype == torch.bfloat16
    result = task(torch.randn(2, 3, 224, 224), torch.arange(2))
    assert list(result["objectives"]) == ["task", *(o.name for o in objectives)]
    result["loss"].backward()
    assert all(p.grad.isfinite().all() for p in own.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [n for n in RECIPES["detect"] if n.endswith("/dto")])
def test_recipe_of_a_detector_steps(name, weights):
    """The true architectures with one block, the true detector on random weights, small images."""
    options = recipe("detect", name, img_size=128, pretrained=False)
    (teacher,) = options.kd_model_name
    architecture = teacher.split(".")[0]
    arguments = {"depth": 1}
    options.kd_model_kwargs, options.kd_teacher_path = arguments, [weights(architecture, arguments)]
    if "rtdetr" in name:
        options.model_kwargs = {**options.model_kwargs, "num_queries": 20, "decoder_layers": 1}
    from dtokd.detect.detectors.build import make_student

    torch.manual_seed(0)
    own = make_student(options, 3)
    task = build_detection(options, own, annotations(), None, torch.device("cpu")).train()
    result = task(images(size=(128, 128)), targets())
    assert list(result["objectives"]) == ["task", "feature"]
    result["loss"].backward()
    assert all(p.grad.isfinite().all() for p in own.parameters() if p.grad is not None)
