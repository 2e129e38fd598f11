"""ViDT-like detectors: a Swin backbone, Deformable DETR's neck, no encoder by default.

ViDT (Song et al., ICLR 2022) puts the detection tokens into Swin itself. Here they enter after it: transformers'
DeformableDetr with a Swin backbone has the same backbone sizes, four levels of patch features, and a deformable decoder
over 100 detection tokens, and no compiled operation. Numbers of the paper are ViDT's and not comparable one to one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import UsageError, reason_of
from .hf import HFDetector

#: Swin's width, depths and heads, as ViDT's Table 1 has them; names on the hub, where there are weights.
SIZES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], str]] = {
    "vidt_nano": (48, (2, 2, 6, 2), (3, 6, 12, 24), ""),
    "vidt_tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24), "microsoft/swin-tiny-patch4-window7-224"),
    "vidt_small": (96, (2, 2, 18, 2), (3, 6, 12, 24), "microsoft/swin-small-patch4-window7-224"),
    "vidt_base": (128, (2, 2, 18, 2), (4, 8, 16, 32), "microsoft/swin-base-patch4-window7-224-in22k"),
}


#: Of the classification loss, in ViDT and in Deformable DETR.
CLASS_WEIGHT = 2.0


def make(
    name: str, classes: int, changes: dict[str, Any], *, pretrained: bool = False, backbone: str = ""
) -> HFDetector:
    """A detector of one of the four sizes.

    Args:
        name: a key of `SIZES`.
        classes: of the data.
        changes: of DeformableDetrConfig, such as encoder_layers (0), num_queries (100), decoder_layers (6); with
            "backbone_" before it, of SwinConfig.
        pretrained: start the backbone with the hub's ImageNet weights.
        backbone: or with the weights of this checkpoint directory of transformers.

    Raises:
        UsageError: a change that the config refuses, or weights that are not there or do not fit.
    """
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, SwinBackbone, SwinConfig

    width, depths, heads, hub = SIZES[name]
    of_backbone = {key.removeprefix("backbone_"): v for key, v in changes.items() if key.startswith("backbone_")}
    swin: dict[str, Any] = {"embed_dim": width, "depths": list(depths), "num_heads": list(heads), "drop_path_rate": 0.1}
    swin |= {"window_size": 7, "out_features": ["stage2", "stage3", "stage4"], **of_backbone}
    neck: dict[str, Any] = {"d_model": 256, "encoder_layers": 0, "decoder_layers": 6, "num_queries": 100}
    neck |= {"encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024, "with_box_refine": True, "auxiliary_loss": True}
    neck |= {key: v for key, v in changes.items() if not key.startswith("backbone_")}
    known = {**DeformableDetrConfig().to_dict(), "num_labels": 0}
    if unknown := [key for key in neck if key not in known]:
        raise UsageError(f"--model-kwargs: DeformableDetrConfig has no {', '.join(unknown)}")
    try:
        config = DeformableDetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone_config=SwinConfig(**swin),
            disable_custom_kernels=True,
            num_labels=classes,
            **neck,
        )
        detector = HFDetector(DeformableDetrForObjectDetection(config), class_weight=CLASS_WEIGHT)
    except Exception as error:  # what transformers and torch raise is of every kind
        reason = reason_of(error)
        raise UsageError(f"--model {name}, --model-kwargs {changes}: {reason}") from error
    if pretrained and not backbone and not hub:
        raise UsageError(
            f"--pretrained: there are no published weights of the backbone of {name}; pass --backbone-checkpoint, "
            "or --initial-checkpoint"
        )
    if pretrained or backbone:
        source = backbone or hub
        if backbone and not Path(backbone).is_dir():
            raise UsageError(f"--backbone-checkpoint: {backbone} is no directory with a Swin of transformers")
        try:
            loaded = SwinBackbone.from_pretrained(source, out_features=swin["out_features"], use_safetensors=True)
            detector.net.model.backbone.model.load_state_dict(loaded.state_dict())
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"--backbone-checkpoint, --pretrained: weights of {source} cannot be loaded into {name}: "
                f"{reason_of(error)}"
            ) from error
    return detector
