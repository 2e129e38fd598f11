"""Every recipe loads, knows its options, builds student and teacher, and trains a few steps."""

import argparse

import dtokd.networks  # noqa: F401  registers them
import pytest
import timm
import torch
from dtokd import recipes
from dtokd.objectives.build import build
from dtokd.train.options import add_arguments, read_config
from safetensors.torch import save_file
from torch import nn

CIFAR = [name for name in recipes.names() if name.startswith("cifar100") and "teacher" not in name]
IMAGENET = [name for name in recipes.names() if name.startswith("imagenet")]


def namespace(name, **changes):
    """The recipe's options as `dtokd train` reads them: each known, each value allowed."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = read_config(parser, recipes.path(name))
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
    assert len([name for name in recipes.names() if not name.startswith("coco_")]) == 24 + 8 + 4


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
    assert objectives == OBJECTIVES[name.rsplit("_", 1)[1]]


@pytest.mark.parametrize("name", [n for n in recipes.names() if n.startswith("cifar100_teacher")])
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
    variant = name.rsplit("_", 1)[1]
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
    (tmp_path / "c.yaml").write_text("extends: [b, _none]\nopt: adamw\n")
    loaded = recipes.load(tmp_path / "c.yaml")
    assert loaded == {"lr": 2, "opt": "adamw", "kd_model_name": None, "kd_teacher_path": None}


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
    with pytest.raises(ValueError, match=r"there is no 'resnet'.*cifar100_resnet56_resnet20_dto"):
        recipes.path("resnet")
