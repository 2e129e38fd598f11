"""What a student is, besides its weights: `config.json` of a run, in the layout of timm's hub.

`timm.create_model("local-dir:RUN", checkpoint_path="RUN/student.safetensors")` makes the student from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timm.data.model_config import resolve_input_data_config
from timm.models._hub import save_config_for_hf

from .errors import UsageError
from .texts import parse_json

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
        names: of its classes, in their order, if the data says.

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
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card


def read_card(folder: str | Path, option: str) -> dict[str, Any]:
    """The `config.json` of a run of `dtokd train`: see `make_card`.

    Args:
        folder: of the run.
        option: by which the user gave it, for messages.

    Raises:
        UsageError: there is none, or it is another file.
    """
    path = Path(folder) / CARD
    try:
        card = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{option}: {folder} is no run directory of dtokd train: it has no {CARD}; pass the file of the weights"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{option}: {path} cannot be read: {error}") from error
    if not isinstance(card, dict) or not isinstance(card.get("architecture"), str) or "pretrained_cfg" not in card:
        raise UsageError(f"{option}: {path} does not describe a classifier of timm")
    return card
