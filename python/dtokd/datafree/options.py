"""The options of `dtokd train --data-free`. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import UsageError
from ..values import BELOW_ONE, COUNT, LOOKING, NATURAL, NOT_NEGATIVE, POSITIVE, Number

#: What a method's options are unless the user says otherwise.
DEFAULTS: dict[str, dict[str, Any]] = {
    "fast": {
        "df_balance": "fixed:10,0.4,1.1",
        "df_disagreement": "kl",
        "df_lr": 5e-3,
        "df_steps": 5,
        "df_every": 5,
        "df_warmup": 20,
        "df_momentum": 0.9,
        "df_batch_size": 64,
    },
    "inversion": {
        "df_balance": "fixed:10,1,1",
        "df_disagreement": "js",
        "df_lr": 5e-2,
        "df_steps": 100,
        "df_every": 50,
        "df_warmup": 10,
        "df_momentum": 0.0,
        "df_batch_size": 64,
    },
}
#: Of one method alone.
OF_ONE = {
    "fast": {"df_latent_dim": 256, "df_latent_lr": 0.015, "df_width": 64, "df_rate": 1.0},
    "inversion": {"df_prior_tv": 0.01, "df_prior_l2": 1e-3},
}
METHODS = tuple(DEFAULTS)
#: Follows on the teacher's time, which is measured in the student's iterations alone.
BESIDES = ", besides its part in making images"
#: Options of training that need images on disk, or several passes over the same ones, and what they must be.
_WITHOUT: dict[str, Any] = {
    "train_crop_mode": None,
    "scale": [0.08, 1.0],
    "ratio": [3 / 4, 4 / 3],
    "color_jitter": 0.4,
    "train_interpolation": "random",
    "aa": None,
    "aug_repeats": 0,
    "mixup": 0,
    "cutmix": 0,
    "cutmix_minmax": None,
    "reprob": 0,
    "kd_cache_teacher": None,
    "kd_held_out": 0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "without data"."""
    group = parser.add_argument_group("without data", "images are made from the teacher")

    def add(name: str, *, help: str, **more: Any) -> None:
        group.add_argument(name, help=help + _of_methods(name.removeprefix("--").replace("-", "_")), **more)

    add(
        "--data-free",
        choices=METHODS,
        metavar="METHOD",
        help=f"how images are made: {' or '.join(METHODS)}; --data-dir or --dataset is then for evaluation alone",
    )
    add(
        "--df-balance",
        type=rule,
        metavar="RULE",
        help="weighting of the losses that images are made by, statistics, confidence and disagreement: a name of "
        f"--kd-balance (not {', '.join(LOOKING)}), with options after a colon, such as share:0.5,0.3,0.2, dto, famo, "
        "cagrad:c=0.4",
    )
    add(
        "--df-balance-gram",
        choices=["exact", "overlap", "lag", "none"],
        default="exact",
        help="how the inner products of their gradients are measured; none: in one backward pass, for weightings that "
        "do not need them",
    )
    add(
        "--df-disagreement",
        choices=["kl", "js"],
        help="the loss disagreement: kl as in Fast-DFKD, without a lower bound; js as in DeepInversion",
    )
    add("--df-lr", type=POSITIVE, metavar="X", help="learning rate of the generator, or of the images (inversion)")
    add("--df-steps", type=COUNT, metavar="N", help="optimizer steps for a batch of images")
    add("--df-batch-size", type=COUNT, metavar="N", help="number of images that are made at a time")
    add("--df-every", type=COUNT, metavar="N", help="the student's iterations from one batch of new images to the next")
    add("--df-warmup", type=COUNT, metavar="N", help="batches of images before the student's first iteration")
    add("--df-momentum", type=BELOW_ONE, metavar="X", help="part of earlier batches in the averaged statistics")
    add("--df-bank", type=COUNT, default=4096, metavar="N", help="number of images that are kept, one byte for a value")
    add("--df-iterations", type=COUNT, default=400, metavar="N", help="the student's iterations in an epoch")
    add(
        "--df-shift",
        type=NATURAL,
        metavar="PIXELS",
        help="largest random shift of images; default: a sixteenth of their height",
    )
    add("--df-latent-dim", type=COUNT, metavar="N", help="fast: length of a code")
    add("--df-latent-lr", type=POSITIVE, metavar="X", help="fast: learning rate of the codes")
    add("--df-width", type=COUNT, metavar="N", help="fast: channels of the generator's last hidden layer")
    add(
        "--df-rate",
        type=Number(float, above=0, most=1),
        metavar="X",
        help="fast: part of the way that the generator moves to its copy, which was optimised for a batch",
    )
    add("--df-prior-tv", type=NOT_NEGATIVE, metavar="X", help="inversion: factor of the total variation in statistics")
    add(
        "--df-prior-l2",
        type=NOT_NEGATIVE,
        metavar="X",
        help="inversion: factor of the pixels' mean square in statistics",
    )


def _of_methods(name: str) -> str:
    """The end of an option's help: its default, where that depends on the method."""
    found = {method: {**values, **OF_ONE[method]}.get(name) for method, values in DEFAULTS.items()}
    values = {value for value in found.values() if value is not None}
    if not values:
        return ""
    if len(values) == 1:
        return f" (default: {values.pop()})"
    return f" (default: {', '.join(f'{value} for {method}' for method, value in found.items())})"


def rule(text: str) -> str:
    """The `type` of --df-balance.

    Raises:
        argparse.ArgumentTypeError: it is no weighting of the three losses.
    """
    from .balance import parse_balance

    try:
        parse_balance(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--df-balance: ")) from error
    return text


def is_own(name: str) -> bool:
    """Whether an option is of this group."""
    return name == "data_free" or name.startswith("df_")


def check(options: argparse.Namespace) -> None:
    """What no single option shows.

    Raises:
        UsageError: two do not go together.
    """
    method = getattr(options, "data_free", None)
    common = {"df_balance_gram": "exact", "df_bank": 4096, "df_iterations": 400}
    given = [name for name, value in vars(options).items() if name.startswith("df_") and value != common.get(name)]
    if method is None:
        if given:
            raise UsageError(f"{_flag(given[0])}: has no effect without --data-free; pass both, or leave it out")
        return
    for other, own in OF_ONE.items():
        for name in own:
            if other != method and name in given:
                raise UsageError(f"{_flag(name)}: an option of --data-free {other}, not of {method}; leave it out")
    if not options.kd_model_name and not options.kd_teacher_path:
        raise UsageError(
            "--data-free: there is no teacher to make images from; pass --kd-model-name, or a run as --kd-teacher-path"
        )
    for name, value in _WITHOUT.items():
        if (getattr(options, name) or None) != (value or None):
            raise UsageError(f"{_flag(name)}: not supported with --data-free; leave one of them out")


def complete(options: argparse.Namespace) -> None:
    """Set what was not given to the method's defaults, so that `args.yaml` has the numbers."""
    for name, value in (DEFAULTS[options.data_free] | OF_ONE[options.data_free]).items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
