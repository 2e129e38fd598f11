"""RT-DETR of transformers on any timm backbone with a pyramid of features."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import MEAN, STD
from .hf import HFDetector


class Backbone(nn.Module):
    """timm's feature maps, as transformers' RT-DETR reads its backbone.

    Args:
        body: of `dense.make_backbone`.
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self._channels: list[int] = body.feature_info.channels()

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Maps of strides 8, 16 and 32, each with where its places are in the image: [B, C, h, w], [B, h, w] bool."""
        maps = self.body(pixel_values)
        # Swin and some others put channels last
        maps = [m if m.shape[1] == c else m.movedim(-1, 1) for m, c in zip(maps, self._channels, strict=True)]
        masks = [nn.functional.interpolate(pixel_mask[:, None].float(), m.shape[-2:])[:, 0].bool() for m in maps]
        return list(zip(maps, masks, strict=True))


def make(name: str, body: Any, classes: int, changes: dict[str, Any]) -> HFDetector:
    """RT-DETR with a backbone of timm: timm's `resnet18d` and `resnet50d` are those of the paper.

    Source: Zhao et al., *DETRs Beat YOLOs on Real-time Object Detection*, CVPR 2024.

    Args:
        name: of the backbone, for timm.
        body: of `dense.make_backbone`.
        classes: of the data.
        changes: of RTDetrConfig, such as num_queries (300), decoder_layers (6), d_model (256), hidden_expansion (1.0).

    Raises:
        ValueError: a change that the config refuses.
    """
    from transformers import RTDetrConfig, RTDetrForObjectDetection, TimmBackboneConfig

    if unknown := [key for key in changes if key not in RTDetrConfig().to_dict()]:
        raise ValueError(f"RTDetrConfig has no {', '.join(unknown)}")
    channels = body.feature_info.channels()
    width = changes.get("encoder_hidden_dim", changes.get("d_model", 256))
    sizes = {"encoder_hidden_dim": width, "decoder_in_channels": [width] * len(channels), **changes}
    # transformers asks the backbone for its channels; it is replaced by the one with the weights
    backbone = TimmBackboneConfig(
        backbone=name, out_indices=body.feature_info.out_indices, use_pretrained_backbone=False
    )
    config = RTDetrConfig(backbone_config=backbone, num_labels=classes, encoder_in_channels=channels, **sizes)
    net = RTDetrForObjectDetection(config)
    net.model.backbone = Backbone(body)
    cfg = getattr(body, "pretrained_cfg", None) or {}
    return HFDetector(net, cfg.get("mean", MEAN), cfg.get("std", STD))
