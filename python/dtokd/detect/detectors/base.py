"""What the engine and the objectives ask of a detector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from ...objectives.taps import Outputs
from ..batch import Detections, Images, Target

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Detections of one image that COCO's evaluation counts.
MOST = 100


class GroupNorm(nn.GroupNorm):
    """Torch's, also for groups of one value, which are their bias: one image, as many channels as groups, a 1 x 1 map.

    Torch refuses them, as nothing is learned there; a small image alone in a batch has such maps.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Of [B, C, ...]."""
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def take_any_image(net: nn.Module) -> None:
    """Make torch's group norms in a network `GroupNorm`."""
    for module in net.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm


class Detector(nn.Module):
    """Images to detections.

    Attributes:
        dense: predictions belong to places of feature maps; otherwise to queries.
        kind: the name of its architecture, on which the meaning of its boxes depends; None if unknown.
        queries: how many, or None.
        sigmoid: classes are scored one by one; otherwise a softmax with "no object" as last class.
        classes: without "no object".
        widths: channels of `Outputs.maps`.
        token_width: of detection tokens, or None.
    """

    dense: bool
    kind: str | None = None
    queries: int | None = None
    sigmoid: bool = True
    classes: int
    widths: list[int]
    token_width: int | None = None

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        super().__init__()
        # not in the state: a checkpoint's weights are the network's
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def normalised(self, images: Images) -> Tensor:
        """Pixels with the detector's own mean and deviation; padding is 0 after it."""
        return (images.pixels - self.mean) / self.std * images.mask[:, None]

    def observe(self, images: Images, targets: list[Target] | None = None) -> Outputs:
        """Its outputs; with targets also its own training loss, a scalar."""
        raise NotImplementedError

    def detect(self, outputs: Outputs, images: Images) -> Detections:
        """At most 100 boxes per image, in pixels of the resized image."""
        raise NotImplementedError

    def decode(self, outputs: Outputs, images: Images) -> tuple[Tensor, Tensor]:
        """All predictions, before any choice among them.

        Returns:
            Scores [B, N, classes] in [0, 1], and boxes [B, N, 4] x0 y0 x1 y1 in pixels of the padded image.
        """
        assert outputs.boxes is not None
        height, width = images.pixels.shape[-2:]
        scale = outputs.boxes.new_tensor([width, height] * 2)
        return self.probabilities(outputs), box_convert(outputs.boxes, "cxcywh", "xyxy") * scale

    def forward(self, images: Images) -> Detections:
        """In evaluation: what is found in an image does not depend on the images beside it.

        Padding would reach it: its border sees zeros in the first layer only, and what the next ones make of them
        after that. So images that would have another padding alone are run apart.
        """
        found: dict[int, dict[str, Tensor]] = {}
        for numbers, part in images.alike():
            found.update(zip(numbers, self.detect(self.observe(part), part).images, strict=True))
        return Detections([found[number] for number in range(len(images))])

    def probabilities(self, outputs: Outputs) -> Tensor:
        """[B, N, classes] in [0, 1]."""
        assert outputs.logits is not None
        logits = outputs.logits.float()
        return logits.sigmoid() if self.sigmoid else logits.softmax(-1)[..., :-1]
