"""Every option of every command with nonsense: refused in one line that names it, or really taken."""

import argparse
import contextlib
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from dtokd import recipes
from dtokd.cli import _parser
from dtokd.errors import UsageError
from dtokd.train import options as train_options
from dtokd.train import reading
from timm.data.transforms import _str_to_pil_interpolation
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from .coco import common as coco_options
from .digits import common, distilling
from .refused import refused

pytestmark = pytest.mark.usefixtures("one_thread")

HUGE, WIDE = "9" * 30, "1e30"
NONSENSE = ("nan", "inf", "-1", "0", WIDE, HUGE, "foo", "")
#: Options that take some of it, and what: they are numbers whose range has such ends.
ACCEPTED = {
    ("0",): "workers hflip vflip drop drop_path model_ema_decay momentum warmup_epochs cooldown_epochs reprob pictures "
    "mixup_prob mixup_switch_prob mixup_off_epoch smoothing bce_target_thresh seed seeds kd_cache_views aug_repeats "
    "cutmix_minmax data_seed kd_held_out threshold df_momentum df_shift",
    ("0", WIDE, HUGE): "lr weight_decay warmup_lr min_lr color_jitter mixup cutmix opt_eps kd_dkd_alpha kd_dkd_beta "
    "task_loss_weight distill_loss_weight tolerance df_prior_tv df_prior_l2",
    (WIDE, HUGE): "lr_base clip_grad decay_epochs decay_rate scale ratio std kd_temperature kd_contrast_temperature "
    "df_lr df_latent_lr",
    ("-1", "0", WIDE, HUGE): "mean",
    ("-1", "0"): "kd_student_stages kd_teacher_stages",
    ("",): "aa interpolation lr_base_scale dist_bn",
}
#: Texts that only the run can judge; `test_refused_by_the_run` has each but the last five, which are any text.
NAMES = "model opt train_split kd_model_name kd_teacher_path data data_dir kd_cache_teacher checkpoint run_dir output "
NAMES += "baseline paths"
TEXTS = "annotations backbone_checkpoint arms class_map dataset device initial_checkpoint kd_balance_gram resume "
TEXTS += "val_split experiment judge_split"


def accepted(dest):
    if dest in TEXTS.split():
        return NONSENSE
    if dest in NAMES.split():
        return NONSENSE[:-1]  # not the empty one
    found = [values for values, names in ACCEPTED.items() if dest in names.split()]
    return found[0] if found else ()


def valued(parser):
    return [action for action in parser._actions if action.dest != "help" and action.nargs != 0]


def read(command, parser, argv):
    if command in ("train", "compare", "detect"):
        return reading.parse(parser, argv)
    return parser.parse_args(argv)


def read_file(parser, path):
    values = reading.read_config(parser, path)
    reading.check(argparse.Namespace(**values))


def refusal(call, *arguments):
    """The error's line; None if there is none."""
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error):
            call(*arguments)
    except SystemExit as end:
        return error.getvalue() if end.code == 2 else f"exit code {end.code}"
    except UsageError as told:
        return f"{told}\n"
    return None


#: What a command needs besides its options.
POSITIONAL = {"report": ["x"], "predict": ["x", "y"], "export": ["x"]}


@pytest.mark.parametrize("command", ["train", "compare", "detect", "eval", "report", "demo", "predict", "export"])
def test_nonsense_on_the_command_line(command):
    """Each value is refused in one line that names the option, but those that are listed above."""
    parser = _parser()[1][command]
    needed = POSITIONAL.get(command, [])
    for action in valued(parser):
        for value in NONSENSE:
            option = action.option_strings[-1:]
            argv = [*option, *[value] * (action.nargs if isinstance(action.nargs, int) else 1)]
            if option:
                argv = [*needed, *argv]
            elif len(needed) > 1:  # the first, or the second of them
                argv = [*argv, *needed[1:]] if action.dest == "run_dir" else [*needed[:1], *argv]
            told = refusal(read, command, parser, argv)
            if value in accepted(action.dest):
                assert told is None, (argv, told)
            else:
                assert told is not None, (argv, "was accepted")
                assert (option[0] if option else action.dest) in told
                assert told.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "compare", "detect"])
def test_nonsense_in_a_file(command, tmp_path):
    """As on the command line; and what only YAML has."""
    path = tmp_path / "c.yaml"
    others = ([], [[1]], {"a": {}}, True, float("nan"), float("inf"))
    parser = _parser()[1][command]
    for action in valued(parser):
        if action.dest == "config" or not action.option_strings:
            continue
        many = action.nargs in ("+", "*") or isinstance(action.nargs, int)
        for value in (*NONSENSE, *others):
            repeats = action.nargs if isinstance(action.nargs, int) else 1
            path.write_text(yaml.safe_dump({action.dest: [value] * repeats if many else value}))
            taken = str(value) in accepted(action.dest)
            if isinstance(action, train_options.KeyValues):
                path.write_text(yaml.safe_dump({action.dest: value}))
                taken = isinstance(value, dict)
            told = refusal(read_file, parser, path)
            assert (told is None) == taken, (path.read_text(), told)
            assert taken or action.dest in told or train_options.flag(action.dest) in told


def test_null_in_a_file(tmp_path):
    """Of options that have no default, and of those that it switches off."""
    path = tmp_path / "c.yaml"
    for key in ("epochs", "batch_size", "model", "kd_balance"):
        path.write_text(f"{key}: null\n")
        with pytest.raises(UsageError, match=f"{key} is null"):
            reading.read_config(_parser()[1]["detect"], path)
    path.write_text("clip_grad: null\nlr: null\nkd_model_name: null\n")
    assert reading.read_config(_parser()[1]["detect"], path)["clip_grad"] is None


@pytest.mark.parametrize("command", ["train", "compare", "detect"])
def test_defaults_are_values(command):
    """What a run writes into args.yaml is read again, by --config, `dtokd report` and `dtokd eval`."""
    parser = _parser()[1][command]
    told = train_options.plain(parser.parse_args([]))
    for action in parser._actions:
        if action.dest in told:
            assert reading.read_value(action, told[action.dest], action.dest) == getattr(
                parser.parse_args([]), action.dest
            )


@pytest.mark.parametrize(
    ("more", "option"),
    [
        (["--mean", "1", "2"], "--mean"),
        (["--in-chans", "1", "--std", "1", "1", "1"], "--std"),
        (["--scale", "1", "0.5"], "--scale"),
        (["--ratio", "2", "1"], "--ratio"),
        (["--cutmix-minmax", "0.5", "0.1"], "--cutmix-minmax"),
        (["--input-size", "1", "32", "32"], "--input-size"),
        (["--opt-betas", "0.9"], "--opt-betas"),
        (["--torchcompile-mode", "max-autotune"], "--torchcompile-mode"),
        (["--aa", "rand-foo"], "--aa"),
        (["--aa", "rand-m5-q3"], "--aa"),
        (["--aa", "augmix-x"], "--aa"),
        (["--opt-kwargs", "a=["], "--opt-kwargs"),
        (["--opt-kwargs", "lr=nan"], "--opt-kwargs"),
    ],
)
def test_values_that_do_not_go_together(more, option):
    assert option in refusal(read, "train", _parser()[1]["train"], more)


def test_policies_that_timm_reads():
    parser = _parser()[1]["train"]
    for text in ("rand-m9-mstd0.5-inc1", "rand-tweights", "augmix-m3-w2", "v0", "original-mstd0.5", "3a"):
        assert reading.parse(parser, ["--aa", text]).aa == text


def weights():
    return torch.nn.Linear(1, 1)


@pytest.mark.parametrize("name", train_options.SCHEDULES)
def test_schedules_are_timms(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # timm would rather have plateau no more
        create_scheduler_v2(
            create_optimizer_v2(weights(), opt="sgd"), sched=name, num_epochs=5, decay_epochs=1, warmup_epochs=1
        )


def test_choices_are_those_of_timm_and_torch():
    from timm.data.random_erasing import RandomErasing
    from timm.data.transforms_factory import transforms_imagenet_train
    from torch._inductor import list_mode_options

    assert set(train_options.INTERPOLATIONS) == set(_str_to_pil_interpolation)
    assert set(train_options.COMPILE_MODES) <= set(list_mode_options())
    for mode in train_options.ERASING_MODES:
        RandomErasing(mode=mode, device="cpu")
    for mode in train_options.CROP_MODES:
        transforms_imagenet_train(8, train_crop_mode=mode)
    with pytest.raises(ValueError, match="foo"):
        create_scheduler_v2(create_optimizer_v2(weights(), opt="sgd"), sched="foo")


REFUSED = {
    "--data-dir": ["foo"],
    "--dataset": ["foo", "torch/foo", "torch/", "foo/bar"],
    "--train-split": ["foo"],
    "--val-split": ["foo"],
    "--class-map": ["foo.txt", "classes.pkl"],
    "--device": ["foo", "", "-1", "meta"],
    "--initial-checkpoint": ["foo", "/"],
    "--model": ["foo", "foo:bar", "local-dir:foo", "a/b"],
    "--drop-path": ["0.5"],
    "--grad-checkpointing": [None],
    "--img-size": ["2147483647"],
    "--opt": ["foo", "lookahead_foo"],
    "--opt-kwargs": ["foo=1"],
    "--model-kwargs": ["foo=1"],
    "--sched": ["wsd"],
    "--sched-on-updates": [None],
    "--kd-model-name": ["foo"],
    "--kd-teacher-path": ["foo", "/"],
    "--kd-balance-gram": ["foo", "every:0", "ema:nan"],
    "--kd-balance-kwargs": ["foo=1"],
    "--kd-stages": ["99"],
    "--kd-teacher-stages": ["99", "-1"],
    "--kd-teacher-feature-dim": ["7"],
    "--kd-cache-teacher": ["/proc/foo"],
    "--kd-distill-type": ["dkd", "token"],
    "--num-classes": ["2147483647"],
    "--resume": ["foo"],
    "--output": ["/proc/foo"],
    "--experiment": ["x" * 300],
    "--config": ["foo", "/", "recipe:foo", ""],
}
#: What an option needs besides, to be looked at.
BESIDES = {
    "--drop-path": "--model cifar_resnet20",
    "--grad-checkpointing": "--model cifar_resnet20",
    "--sched-on-updates": "--sched plateau",
    "--kd-distill-type": "--mixup 0.2",
    "--kd-stages": "--kd-distill-type attention",
    "--kd-teacher-stages": "--kd-distill-type attention",
    "--kd-teacher-feature-dim": "--kd-distill-type feature",
}


@pytest.mark.parametrize("option", REFUSED)
def test_refused_by_the_run(capsys, digits, teacher, tmp_path, option):
    """What only the data, the model or the machine can judge: one line, and nothing was trained."""
    more = BESIDES.get(option, "").split()
    if option.startswith("--kd"):
        more = [*distilling(teacher), "--kd-balance", "dto", "--opt", "adamw", *more]
    for value in REFUSED[option]:
        given = [option] if value is None else [option, value]
        told = refused(capsys, "train", *common(digits, tmp_path), *more, *given)
        assert option in told
    assert not list(tmp_path.rglob("summary.csv"))


DETECT_REFUSED = {
    "--data-dir": ["foo"],
    "--annotations": ["foo", ""],
    "--train-split": ["foo"],
    "--val-split": ["foo"],
    "--device": ["foo", "cuda:99"],
    "--model": ["foo", "fcos:foo", "fcos:"],
    "--model-kwargs": ["foo=1"],
    "--backbone-checkpoint": ["foo"],
    "--initial-checkpoint": ["foo", "/"],
    "--kd-model-name": ["foo"],
    "--kd-teacher-path": ["foo", "/"],
    "--kd-model-kwargs": ["foo=1"],
    "--opt": ["foo"],
    "--opt-kwargs": ["foo=1"],
    "--sched": ["wsd"],
    "--resume": ["foo"],
    "--config": ["foo", "recipe:foo"],
}


@pytest.mark.parametrize("option", DETECT_REFUSED)
def test_refused_by_detect(capsys, coco, tmp_path, option):
    """As `test_refused_by_the_run`."""
    model = ["--model", "fcos:test_resnet"]
    more = ["--kd-model-name", "fcos:test_resnet", "--kd-teacher-path", "foo"] if option.startswith("--kd") else []
    for value in DETECT_REFUSED[option]:
        told = refused(capsys, "detect", *coco_options(coco, tmp_path), *model, *more, option, value)
        assert option in told
    assert not list(tmp_path.rglob("summary.csv"))


def test_gpu_that_is_not_there(capsys, digits, tmp_path):
    """The default falls back to the CPU; a GPU that is asked for by number does not."""
    number = torch.cuda.device_count()
    assert "--device" in refused(capsys, "train", *common(digits, tmp_path), "--device", f"cuda:{number}")


def test_refused_by_eval_and_report(capsys, digits, tmp_path):
    where = ["--data-dir", digits, "--model", "test_resnet", "--device", "cpu"]
    assert "--checkpoint" in refused(capsys, "eval", *where, "--checkpoint", tmp_path / "foo")
    assert "foo" in refused(capsys, "eval", tmp_path / "foo")
    assert "foo" in refused(capsys, "report", tmp_path / "foo")
    assert "--mean" in refused(capsys, "eval", *where, "--pretrained", "--mean", 1, 2)


class _Pwned:
    def __reduce__(self):
        return Path.touch, (Path(_Pwned.target),)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_nothing_is_unpickled(capsys, digits, teacher, coco, tmp_path, kind):
    """A file of weights that would run code is refused by every option that takes one, and the code does not run."""
    _Pwned.target = tmp_path / "pwned"
    file = tmp_path / "evil.pth"
    if kind == "torch":
        torch.save({"state_dict": _Pwned()}, file)
    else:
        file.write_bytes(pickle.dumps(_Pwned()))
    classes = tmp_path / "evil.pkl"
    classes.write_bytes(pickle.dumps(_Pwned()))
    pickle.loads(classes.read_bytes())  # it does run code
    _Pwned.target.unlink()
    options = common(digits, tmp_path)
    for option, value in (
        ("--initial-checkpoint", file),
        ("--kd-teacher-path", file),
        ("--resume", file),
        ("--class-map", classes),
    ):
        assert option in refused(capsys, "train", *options, *distilling(teacher), option, value)
    where = ["--data-dir", digits, "--model", "test_resnet", "--device", "cpu"]
    assert "--checkpoint" in refused(capsys, "eval", *where, "--checkpoint", file)
    detector = [*coco_options(coco, tmp_path), "--model", "fcos:test_resnet"]
    teaching = ["--kd-model-name", "fcos:test_resnet", "--kd-teacher-path"]
    for options in (["--backbone-checkpoint"], ["--initial-checkpoint"], ["--resume"], teaching):
        assert options[-1] in refused(capsys, "detect", *detector, *options, file)
    assert not _Pwned.target.exists()


def recipes_of(command):
    return [name for name in recipes.names() if name.startswith("coco") == (command == "detect")]


@pytest.mark.parametrize("command", ["train", "detect"])
def test_recipes_without_data(capsys, command):
    """One line each, as their paths are the user's to give."""
    names = recipes_of(command)
    assert len(names) > 10
    for name in names:
        assert "--data-dir" in refused(capsys, command, "--config", f"recipe:{name}", "--device", "cpu"), name


@pytest.mark.parametrize("name", [n for n in recipes_of("train") if recipes.load(f"recipe:{n}").get("kd_teacher_path")])
def test_recipes_without_a_teacher(capsys, digits, name):
    """The teacher's recipe was not run before."""
    where = ["--dataset", "", "--data-dir", digits, "--num-classes", "10", "--device", "cpu", "--workers", "0"]
    assert "--kd-teacher-path: there is no file runs/" in refused(capsys, "train", "--config", f"recipe:{name}", *where)
