"""Every recipe loads, knows its options, builds student and teacher, and trains a few steps."""

import argparse
from pathlib import Path

import dtokd.networks  # noqa: F401  registers them
import pytest
import timm
import torch
from dtokd import recipes
from dtokd.objectives.build import build
from dtokd.train import options as train_options
from dtokd.train.reading import read_config
from dtokd.values import parser_of
from safetensors.torch import save_file
from torch import nn

CIFAR = [name for name in recipes.names() if name.startswith("cifar100/") and "teacher" not in name]
IMAGENET = [name for name in recipes.names() if name.startswith("imagenet/")]
ROOT = Path(__file__).parents[1]


def namespace(name, **changes):
    """The recipe's options as `dtokd train` reads them: each known, each value allowed."""
    parser = parser_of(train_options)
    given = read_config(parser, f"recipe:{name}")
    return argparse.Namespace(**{**vars(parser.parse_args([])), **given, **changes})


def train(options, student, classes, size, batch=2, steps=2):
    torch.manual_seed(0)
    task = build(options, student, nn.CrossEntropyLoss(), device=torch.device("cpu"), dtype=torch.float32).train()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=1e-3)
    for _ in range(steps):
        result = task(torch.randn(batch, 3, size, size), torch.randint(classes, (batch,)))
        assert result["loss"].isfinite()
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    return task, list(result["objectives"])


OBJECTIVES = {
    "none": ["task"],
    "kd": ["task", "kl"],
    "vkd": ["task", "kl", "feature"],
    "dto": ["task", "kl", "feature"],
}


def test_the_tables_are_whole():
    assert len(CIFAR) == 6 * 4
    assert len(IMAGENET) == 2 * 4
    assert len([name for name in recipes.names() if "dinov3" not in name and "coco" not in name]) == 24 + 8 + 4


#: The options of a student in one balanced recipe of each table, all of them.
WHOLE = {
    "cifar100/resnet50-mobilenetv2/dto": {
        "experiment": "cifar100_resnet50_mobilenetv2_dto", "output": "runs",
        "model": "cifar_mobilenetv2", "kd_model_name": "cifar_resnet50",
        "kd_teacher_path": "runs/cifar100_teacher_resnet50/student.safetensors",
        "kd_distill_type": ["logit", "feature"], "kd_temperature": 4.0, "kd_balance": "dto", "clip_grad": 1.0,
        "kd_projector": "orthogonal", "kd_feature_norm": "layernorm", "kd_feature_loss": "smooth_l1",
        "task_loss_weight": 1.0, "distill_loss_weight": [1.0, 1.0],
        "dataset": "torch/cifar100", "num_classes": 100, "img_size": 32,
        "mean": [0.5071, 0.4867, 0.4408], "std": [0.2675, 0.2565, 0.2761], "scale": [0.7, 1.0], "ratio": [1.0, 1.0],
        "hflip": 0.5, "color_jitter": 0.0, "crop_pct": 1.0, "smoothing": 0.0, "batch_size": 64, "epochs": 240,
        "opt": "momentum", "momentum": 0.9, "weight_decay": 5e-4, "lr": 0.01, "sched": "multistep",
        "decay_milestones": [150, 180, 210], "decay_rate": 0.1, "warmup_epochs": 0,
    },
    "imagenet/deit_small/dto": {
        "experiment": "imagenet_deit_small_dto", "output": "runs",
        "model": "deit_small_distilled_patch16_224", "kd_model_name": "regnety_160.deit_in1k",
        "kd_teacher_dtype": "bfloat16", "kd_distill_type": ["token", "feature"], "kd_token_distill_type": "soft",
        "kd_temperature": 1.0, "kd_balance": "dto", "clip_grad": 1.0, "kd_projector": "orthogonal",
        "kd_feature_norm": "layernorm", "kd_feature_loss": "smooth_l1", "kd_feature_pool": "mean",
        "task_loss_weight": 1.0, "distill_loss_weight": [1.0, 1.0], "num_classes": 1000, "img_size": 224,
        "batch_size": 256, "grad_accum_steps": 4, "epochs": 300, "opt": "adamw", "lr": 1e-3, "weight_decay": 0.05,
        "sched": "cosine", "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5, "drop_path": 0.1,
        "aa": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "train_interpolation": "bicubic", "mixup": 0.8,
        "cutmix": 1.0, "smoothing": 0.1, "reprob": 0.25, "amp": True, "amp_dtype": "bfloat16",
    },
    "coco/vidt_base-vidt_tiny/dto": {
        "experiment": "coco_vidt_base_vidt_tiny_dto", "output": "runs", "model": "vidt_tiny", "pretrained": True,
        "kd_model_name": "vidt_base", "kd_teacher_path": "runs/coco_teacher_vidt_base/student.safetensors",
        "kd_distill_type": ["token"], "kd_match": "index", "kd_projector": "orthogonal",
        "kd_feature_norm": "standardize", "kd_feature_loss": "smooth_l1", "task_loss_weight": 1.0,
        "distill_loss_weight": [4.0], "kd_balance": "dto", "train_split": "train2017", "val_split": "val2017",
        "img_size": 800, "max_size": 1333, "scales": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        "crop": True, "batch_size": 2, "grad_accum_steps": 8, "epochs": 50, "opt": "dtoadamw", "lr": 1e-4,
        "weight_decay": 1e-4, "clip_grad": 0.1, "sched": "cosine", "warmup_epochs": 0, "min_lr": 1e-7,
    },
}  # fmt: skip
#: What another recipe of the same table changes of that; None: it leaves the option out.
CHANGES = {
    "cifar100/resnet50-mobilenetv2/vkd": {"kd_balance": None, "clip_grad": None},
    "cifar100/resnet50-mobilenetv2/kd": {
        **dict.fromkeys(["kd_balance", "clip_grad", "kd_projector", "kd_feature_norm", "kd_feature_loss"]),
        "kd_distill_type": ["logit"], "task_loss_weight": 0.1, "distill_loss_weight": [0.9],
    },
    "imagenet/deit_small/vkd": {"kd_balance": None, "clip_grad": None},
    "imagenet/deit_small/kd": {
        **dict.fromkeys(["kd_balance", "clip_grad", "kd_projector", "kd_feature_norm", "kd_feature_loss"]),
        **dict.fromkeys(["kd_feature_pool", "kd_temperature", "distill_loss_weight"]),
        "kd_distill_type": ["token"], "kd_token_distill_type": "hard", "task_loss_weight": 0.5,
    },
    "coco/vidt_base-vidt_tiny/vkd": {"kd_balance": None, "opt": "adamw"},
    "coco/vidt_base-vidt_tiny/token": {
        **dict.fromkeys(["kd_projector", "kd_feature_norm", "kd_balance"]),
        "opt": "adamw", "kd_feature_loss": "norm", "kd_token_root": True,
    },
    "coco/vidt_base-vidt_tiny/unclipped": {"clip_grad": None},
    "coco/vidt_base-vidt_tiny/projector": {"kd_balance": None, "clip_grad": None, "opt": "adamw"},
    "coco/vidt_base-vidt_tiny/balance": {
        **dict.fromkeys(["kd_projector", "kd_feature_norm", "clip_grad"]),
        "kd_feature_loss": "norm", "kd_token_root": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [*WHOLE, *CHANGES])
def test_options_of_recipes(name):
    folder, _, variant = name.rpartition("/")
    whole = WHOLE[f"{folder}/dto"]
    changed = {**whole, "experiment": f"{whole['experiment'].removesuffix('dto')}{variant}", **CHANGES.get(name, {})}
    loaded = recipes.load(f"recipe:{name}")
    assert {k: v for k, v in loaded.items() if v is not None} == {k: v for k, v in changed.items() if v is not None}


@pytest.mark.parametrize(
    ("table", "page"),
    [
        ("cifar100", "recipes"),
        ("imagenet", "recipes"),
        ("dinov3", "recipes"),
        ("coco", "detect"),
        ("coco_dinov3", "detect"),
    ],
)
def test_documents_show_the_tables(table, page):
    """`python -m dtokd.recipes` prints them."""
    assert recipes.markdown(table) in (ROOT / "docs" / f"{page}.md").read_text()


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_recipe_trains(name, tmp_path):
    options = namespace(name)
    torch.manual_seed(1)
    if options.kd_model_name:
        path = tmp_path / "teacher.safetensors"
        (teacher,) = options.kd_model_name
        save_file(timm.create_model(teacher, num_classes=100).state_dict(), path)
        options.kd_teacher_path = [str(path)]
    student = timm.create_model(options.model, num_classes=options.num_classes)
    _, objectives = train(options, student, 100, 32)
    assert objectives == OBJECTIVES[name.rpartition("/")[2]]


@pytest.mark.parametrize("name", [n for n in recipes.names() if n.startswith("cifar100/teacher")])
def test_teacher_recipe_builds(name):
    options = namespace(name)
    assert options.kd_model_name is None
    assert timm.create_model(options.model, num_classes=100, device="meta").num_classes == 100


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipe_trains(name, tmp_path):
    """The real models are built without storage; the steps run with a shallow student and a small stand-in teacher."""
    options = namespace(name)
    real = timm.create_model(options.model, num_classes=1000, device="meta")
    assert real.num_classes == 1000
    variant = name.rpartition("/")[2]
    if variant != "none":
        assert options.kd_model_name == ["regnety_160.deit_in1k"]
        teacher = timm.create_model(*options.kd_model_name, device="meta")
        assert (teacher.num_classes, teacher.num_features) == (1000, 3024)
        path = tmp_path / "teacher.safetensors"
        save_file(timm.create_model("test_resnet", num_classes=1000).state_dict(), path)
        options.kd_model_name, options.kd_teacher_path = ["test_resnet"], [str(path)]
    student = timm.create_model(options.model, num_classes=1000, depth=1, drop_path_rate=options.drop_path)
    task, objectives = train(options, student, 1000, 224, steps=1)
    assert objectives == [{"kl": "token"}.get(o, o) for o in OBJECTIVES[variant]]
    if variant == "kd":
        assert (task.task_loss_weight, task.distill_loss_weights) == (0.5, {"token": 0.5})


def test_extends(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1\nopt: sgd\n")
    (tmp_path / "b.yaml").write_text("extends: a\nlr: 2\n")
    (tmp_path / "c.yaml").write_text("extends: [recipe:coco/vidt_nano/none, b]\nopt: adamw\n")
    loaded = recipes.load(tmp_path / "c.yaml")
    assert loaded == {**recipes.load("recipe:coco/vidt_nano/none"), "lr": 2, "opt": "adamw"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("extends: x\n", "extends itself"), ("extends: y\n", "extends 'y'"), ("- 1\n", "mapping"), ("a: [\n", "not YAML")],
)
def test_bad_files(text, message, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        recipes.load(file)


def test_unknown_recipe():
    with pytest.raises(ValueError, match=r"there is no 'cifar100_resnet56_.*; choose cifar100/resnet56-resnet20/dto"):
        recipes.load("recipe:cifar100_resnet56_resnet20_dto")
