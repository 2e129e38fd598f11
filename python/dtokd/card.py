"""What a student is, besides its weights: `config.json` of a run, in the layout of timm's hub.

`timm.create_model("local-dir:RUN", checkpoint_path="RUN/student.safetensors")` makes the student from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timm.data.model_config import resolve_input_data_config
from timm.models._hub import save_config_for_hf

from .errors import UsageError
from .texts import read_json

CARD = "config.json"


def input_config(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """The images' size, normalisation, interpolation and crop: the options', or the model's.

    Raises:
        UsageError: the model does not take them.
    """
    try:
        return dict(resolve_input_data_config(model, vars(options)))
    except ValueError as error:
        raise UsageError(f"--img-size, --input-size, --in-chans, --mean, --std: {error}") from error


def make_card(name: str, model: Any, config: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        name: of the architecture, as timm has it.
        model: the student, as timm has made it.
        config: of `input_config`.
        names: of its classes, in their order, if the data has names.

    Returns:
        architecture, num_classes, label_names, model_args, and pretrained_cfg with the preprocessing.

    Raises:
        UsageError: an argument of the model can't be written as JSON.
    """
    known: dict[str, Any] = {} if names is None else {"label_names": names}
    if "architecture" not in model.pretrained_cfg:  # a model of one's own
        known["pretrained_cfg"] = {"architecture": name.rpartition(":")[2]}
    with TemporaryDirectory() as folder:
        path = Path(folder) / CARD
        try:
            save_config_for_hf(model, str(path), model_config=known, data_config=config)
        except ValueError as error:
            raise UsageError(f"--model-kwargs: {error}") from error
        card: dict[str, Any] = read_json(path)
    return card


def read_card(folder: str | Path, option: str, detects: bool = False) -> dict[str, Any]:
    """The `config.json` of a run of `dtokd train`, see `make_card`, or of `dtokd detect`.

    Args:
        folder: of the run.
        option: by which the user gave it, for messages.
        detects: whether it is a detector's.

    Raises:
        UsageError: there is none, or it is another file.
    """
    path, command = Path(folder) / CARD, "dtokd detect" if detects else "dtokd train"
    try:
        card = read_json(path)
    except FileNotFoundError:
        raise UsageError(
            f"{option}: {folder} is no run directory of {command}: it has no {CARD}; pass the file of the weights"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{option}: {path} cannot be read: {error}") from error
    needed = ("label_names", "category_ids", "num_classes") if detects else ("pretrained_cfg",)
    if not (isinstance(card, dict) and isinstance(card.get("architecture"), str) and card.keys() >= set(needed)):
        raise UsageError(f"{option}: {path} does not describe a {'detector' if detects else 'classifier'} of {command}")
    return card
