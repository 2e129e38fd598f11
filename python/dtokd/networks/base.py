"""What the CIFAR networks share: stem, stages, pooling, classifier, and timm's interface to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor, nn

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class CifarNet(nn.Module):
    """stem -> stages -> final -> mean over positions -> classifier.

    Args:
        stem: from images to the first maps.
        stages: (module, channels out, total reduction of height and width) each.
        final: after the stages: the last norm, activation or 1x1 convolution.
        num_features: channels after `final`.
        num_classes: of the classifier; 0 for none.
        in_chans: of the images.
        drop_rate: of the dropout before the classifier.
    """

    pretrained_cfg: dict[str, Any]

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[tuple[nn.Module, int, int]],
        final: nn.Module,
        num_features: int,
        *,
        num_classes: int = 100,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = num_features
        self.num_classes, self.in_chans = num_classes, in_chans
        self.stem, self.stages, self.final = stem, nn.ModuleList([s for s, _, _ in stages]), final
        self.head_drop = nn.Dropout(drop_rate)
        self.feature_info = [
            {"num_chs": channels, "reduction": reduction, "module": f"stages.{i}"}
            for i, (_, channels, reduction) in enumerate(stages)
        ]
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.default_cfg = self.pretrained_cfg = {
            "url": "",
            "num_classes": num_classes,
            "input_size": (in_chans, 32, 32),
            "pool_size": None,
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": MEAN,
            "std": STD,
            "classifier": "fc",
        }

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of `num_classes`; 0: none."""
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer decay."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None)]}

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, num_features, h, w]."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.final(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As timm's models: the final features and the stages' outputs, or those alone."""
        take, last = feature_take_indices(len(self.stages), indices)
        kept = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if intermediates_only and stop_early and i > last:
                break
            x = stage(x)
            if i in take:
                kept.append(x)
        return kept if intermediates_only else (self.final(x), kept)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, num_features, h, w] -> logits, or the pooled features [B, num_features]."""
        x = self.head_drop(x.mean((2, 3)))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel shuffle of ShuffleNet: [B, groups * n, H, W] with the two factors swapped."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def conv_bn(
    in_chans: int, out_chans: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Module:
    """Convolution, BatchNorm and, with `act`, ReLU."""
    conv = nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(out_chans)]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))
