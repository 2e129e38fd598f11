"""torchvision's FCOS and RetinaNet on any timm backbone with a pyramid of features."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ...errors import UsageError
from ...objectives.taps import Outputs
from ..batch import Detections, Images, Target
from .base import MEAN, MOST, STD, Detector, take_any_image

#: Strides of the backbone's maps that the pyramid takes; it adds 64 and 128.
STRIDES = (8, 16, 32)


class Pyramid(nn.Module):
    """timm's feature maps of strides 8, 16, 32, and torchvision's FPN: five maps of strides 8 to 128."""

    def __init__(self, body: Any, out_channels: int) -> None:
        super().__init__()
        self.body, self.out_channels = body, out_channels
        self._channels = body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(self._channels, out_channels, LastLevelP6P7(out_channels, out_channels))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] to maps by name."""
        maps = self.body(x)
        # Swin and some others put channels last
        maps = [m if m.shape[1] == c else m.movedim(-1, 1) for m, c in zip(maps, self._channels, strict=True)]
        found: dict[str, Tensor] = self.fpn({str(i): m for i, m in enumerate(maps)})
        return found


def make_backbone(name: str, weights: dict[str, Any], image_size: int | None) -> Any:
    """A timm model's maps of strides 8, 16 and 32, as `fcos`, `retinanet` and `rtdetr` take them.

    Args:
        name: timm's.
        weights: "pretrained" and perhaps "pretrained_cfg_overlay", as `timm.create_model` takes them.
        image_size: for models that want to know (Swin); others ignore it.

    Raises:
        UsageError: timm has none of this name, or it has no such maps.
    """
    if not timm.is_model(name.split("/")[-1]):
        raise UsageError(f"--model: timm has no model {name!r}; timm.list_models('*part*') finds names")
    try:
        reductions = timm.create_model(name, features_only=True).feature_info.reduction()
        indices = [reductions.index(stride) for stride in STRIDES]
        if "swin" in name and image_size:
            weights = {**weights, "img_size": image_size, "strict_img_size": False}
        return timm.create_model(name, features_only=True, out_indices=indices, **weights)
    except (ValueError, RuntimeError, AttributeError, AssertionError) as error:
        raise UsageError(
            f"--model: {name} gives no maps of strides {STRIDES}: {error}; choose a convolutional or Swin backbone"
        ) from error


class Dense(Detector):
    """One of torchvision's one-stage detectors.

    Args:
        kind: "fcos" or "retinanet".
        backbone: of `make_backbone`.
        classes: of the data.
        width: channels of the pyramid.
        score_thresh, nms_thresh: of detections, torchvision's defaults for COCO but the first: 0.05 as RetinaNet has
            it, since what is cut off is missing from AP.

    Raises:
        ValueError: one of these is out of its range.
    """

    dense = True

    def __init__(
        self,
        kind: str,
        backbone: Any,
        classes: int,
        *,
        width: int = 256,
        score_thresh: float = 0.05,
        nms_thresh: float | None = None,
    ) -> None:
        if not isinstance(width, int) or width < 32 or width % 32:
            raise ValueError(f"width is {width!r}; expected a multiple of 32")
        for name, value in (("score_thresh", score_thresh), ("nms_thresh", nms_thresh)):
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1):
                raise ValueError(f"{name} is {value!r}; expected a number from 0 to 1")
        cfg = getattr(backbone, "pretrained_cfg", None) or {}
        super().__init__(cfg.get("mean", MEAN), cfg.get("std", STD))
        self.kind, self.classes, self.widths = kind, classes, [width] * 5
        pyramid = Pyramid(backbone, width)
        shared: dict[str, Any] = {"score_thresh": score_thresh, "detections_per_img": MOST}
        if kind == "fcos":
            self.net: Any = FCOS(pyramid, classes, nms_thresh=0.6 if nms_thresh is None else nms_thresh, **shared)
        else:
            # torchvision's RetinaNet of strides 8 to 128: three sizes and three shapes at each place
            sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
            anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
            thresh = 0.5 if nms_thresh is None else nms_thresh
            self.net = RetinaNet(pyramid, classes, anchor_generator=anchors, nms_thresh=thresh, **shared)
        take_any_image(self.net)
        # resizing, padding and normalising are ours: teacher and student must see the same pixels
        del self.net.transform

    def observe(self, images: Images, targets: list[Target] | None = None) -> Outputs:
        """See `Detector`. The loss is the sum of FCOS's focal, GIoU and centerness, or RetinaNet's focal and L1."""
        maps = tuple(self.net.backbone(self.normalised(images)).values())
        head = self.net.head(list(maps))
        quality = head.get("bbox_ctrness")
        outputs = Outputs(
            head["cls_logits"],
            boxes=head["bbox_regression"],
            quality=None if quality is None else quality.squeeze(-1),
            maps=maps,
        )
        if targets is None:
            return outputs
        more = (self._per_level(outputs),) if self.kind == "fcos" else ()
        losses = self.net.compute_loss(targets, self._head(outputs), self._anchors(outputs, images), *more)
        return outputs._replace(loss=torch.stack([loss.float() for loss in losses.values()]).sum())

    def detect(self, outputs: Outputs, images: Images) -> Detections:
        """Scores above the threshold, non-maximum suppression per class."""
        counts = self._per_level(outputs)
        head = {name: list(values.split(counts, dim=1)) for name, values in self._head(outputs).items()}
        anchors = [list(a.split(counts)) for a in self._anchors(outputs, images)]
        return Detections(self.net.postprocess_detections(head, anchors, images.sizes))

    def decode(self, outputs: Outputs, images: Images) -> tuple[Tensor, Tensor]:
        """See `Detector`; of FCOS the root of class and centerness, as torchvision has it."""
        assert outputs.boxes is not None
        codes, anchors = outputs.boxes.float(), self._anchors(outputs, images)[0]
        scores = self.probabilities(outputs)
        if self.kind == "fcos":
            assert outputs.quality is not None
            quality = outputs.quality.float().sigmoid().unsqueeze(-1)
            return (scores * quality).sqrt(), self.net.box_coder.decode(codes, anchors)
        several = anchors.expand(len(codes), -1, -1).flatten(0, 1)
        return scores, self.net.box_coder.decode_single(codes.flatten(0, 1), several).view_as(codes)

    def _head(self, outputs: Outputs) -> dict[str, Tensor]:
        assert outputs.logits is not None
        assert outputs.boxes is not None
        head = {"cls_logits": outputs.logits.float(), "bbox_regression": outputs.boxes.float()}
        return head if outputs.quality is None else {**head, "bbox_ctrness": outputs.quality.float().unsqueeze(-1)}

    def _anchors(self, outputs: Outputs, images: Images) -> list[Tensor]:
        anchors: list[Tensor] = self.net.anchor_generator(ImageList(images.pixels, images.sizes), list(outputs.maps))
        return anchors

    def _per_level(self, outputs: Outputs) -> list[int]:
        places = [m.shape[-2] * m.shape[-1] for m in outputs.maps]
        assert outputs.logits is not None
        each = outputs.logits.shape[1] // sum(places)
        return [each * n for n in places]
