"""The networks, registered with timm. Their blocks are timm's and torchvision's where these have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck, make_blocks
from torch import Tensor, nn
from torchvision.models.shufflenetv2 import InvertedResidual as ShuffleUnit

from .base import CifarNet, conv_bn, shuffle


def _network(make: Callable[..., CifarNet], pretrained: bool, kwargs: dict[str, Any], *args: Any) -> CifarNet:
    """What timm's `create_model` wants of an entry point: its own keywords handled, unknown ones refused.

    Raises:
        RuntimeError: pretrained weights: there are none.
    """
    if pretrained:
        raise RuntimeError("there are no pretrained weights of the CIFAR networks; train one or pass a checkpoint")
    cfg = kwargs.pop("pretrained_cfg", None)
    for name in ("pretrained_cfg_overlay", "pretrained_model_args", "cache_dir"):
        kwargs.pop(name, None)
    where = {name: kwargs.pop(name) for name in ("device", "dtype") if kwargs.get(name) is not None}
    with torch.device(where.get("device") or torch.get_default_device()):
        model = make(*args, **{k: v for k, v in kwargs.items() if v is not None})
    if isinstance(cfg, dict):  # of a directory that describes a model
        model.pretrained_cfg = {**model.pretrained_cfg, **cfg}
    return model.to(**where)


def resnet(
    block: type[BasicBlock | Bottleneck], layers: tuple[int, ...], stem: int, channels: tuple[int, ...], **kwargs: Any
) -> CifarNet:
    """ResNet with a 3x3 stem and no pooling after it (He et al., 2016, section 4.2)."""
    in_chans = kwargs.get("in_chans", 3)
    made, _ = make_blocks((block,) * len(layers), channels, layers, stem)
    widths = [c * block.expansion for c in channels]
    stages = [(module, width, 2**i) for i, ((_, module), width) in enumerate(zip(made, widths, strict=True))]
    return CifarNet(conv_bn(in_chans, stem, 3), stages, nn.Identity(), widths[-1], **kwargs)


class PreActivation(nn.Module):
    """Wide ResNet's block: norm and activation before each convolution (Zagoruyko and Komodakis, 2016)."""

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(in_chans), nn.Conv2d(in_chans, out_chans, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(out_chans), nn.Conv2d(out_chans, out_chans, 3, 1, 1, bias=False)
        self.shortcut = None if in_chans == out_chans else nn.Conv2d(in_chans, out_chans, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same of the next block."""
        active = self.norm1(x).relu()
        y = self.conv2(self.norm2(self.conv1(active)).relu())
        return y + (x if self.shortcut is None else self.shortcut(active))


def wide_resnet(depth: int, widen: int, **kwargs: Any) -> CifarNet:
    """WRN-depth-widen."""
    blocks, chans, stages = (depth - 4) // 6, 16, []
    for i, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
        inputs = [chans] + [width] * (blocks - 1)
        stage = [PreActivation(c, width, 2 if i and not b else 1) for b, c in enumerate(inputs)]
        stages.append((nn.Sequential(*stage), width, 2**i))
        chans = width
    stem = nn.Conv2d(kwargs.get("in_chans", 3), 16, 3, padding=1, bias=False)
    return CifarNet(stem, stages, nn.Sequential(nn.BatchNorm2d(chans), nn.ReLU()), chans, **kwargs)


class InvertedResidual(nn.Module):
    """MobileNetV2's block with ReLU; the expansion is there at ratio 1 too, other than in torchvision's and timm's."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = in_chans * expand
        self.layers = nn.Sequential(
            conv_bn(in_chans, inner, 1),
            conv_bn(inner, inner, 3, stride, groups=inner),
            conv_bn(inner, out_chans, 1, act=False),
        )
        self.residual = stride == 1 and in_chans == out_chans

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same of the next block."""
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet_v2(**kwargs: Any) -> CifarNet:
    """MobileNetV2 at half width, for 32 x 32: a stem of stride 2 and three more halvings (Sandler et al., 2018)."""
    settings = [(1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)]
    chans, reduction, stages = 16, 2, []
    for expand, width, blocks, stride in settings:
        inputs = [chans] + [width] * (blocks - 1)
        stage = [InvertedResidual(c, width, 1 if b else stride, expand) for b, c in enumerate(inputs)]
        reduction, chans = reduction * stride, width
        stages.append((nn.Sequential(*stage), width, reduction))
    # one stage per resolution, as CNNs' feature_info counts them
    groups = [stages[0:2], stages[2:3], stages[3:5], stages[5:7]]
    merged = [(nn.Sequential(*[b for s, _, _ in g for b in s]), g[-1][1], g[-1][2]) for g in groups]
    return CifarNet(conv_bn(kwargs.get("in_chans", 3), 16, 3, 2), merged, conv_bn(chans, 1280, 1), 1280, **kwargs)


class GroupedUnit(nn.Module):
    """ShuffleNetV1's unit (Zhang et al., 2018): grouped 1x1, shuffle, depthwise 3x3, grouped 1x1."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        self.stride, self.groups = stride, first_groups
        made = out_chans - in_chans if stride == 2 else out_chans  # the pooled input is the rest
        inner = made // 4
        self.enter = conv_bn(in_chans, inner, 1, groups=first_groups)
        self.spatial = conv_bn(inner, inner, 3, stride, groups=inner)
        self.leave = conv_bn(inner, made, 1, groups=groups, act=False)
        self.pool = nn.AvgPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same of the next block."""
        y = self.leave(self.spatial(shuffle(self.enter(x), self.groups)))
        return (torch.cat([y, self.pool(x)], 1) if self.stride == 2 else y + x).relu()


def shufflenet_v1(**kwargs: Any) -> CifarNet:
    """ShuffleNetV1 with 3 groups; the first unit's 1x1 is not grouped, its input has 24 channels."""
    chans, stages = 24, []
    for i, (width, blocks) in enumerate([(240, 4), (480, 8), (960, 4)]):
        units = [GroupedUnit(chans, width, 2, 3, 1 if i == 0 else 3)]
        units += [GroupedUnit(width, width, 1, 3, 3) for _ in range(blocks - 1)]
        stages.append((nn.Sequential(*units), width, 2 ** (i + 1)))
        chans = width
    return CifarNet(conv_bn(kwargs.get("in_chans", 3), 24, 1), stages, nn.Identity(), chans, **kwargs)


def shufflenet_v2(**kwargs: Any) -> CifarNet:
    """ShuffleNetV2 at width 1 (Ma et al., 2018), of torchvision's units, with a 1x1 stem and no pooling after it."""
    chans, stages = 24, []
    for i, (width, blocks) in enumerate([(116, 4), (232, 8), (464, 4)]):
        units = [ShuffleUnit(chans, width, 2)] + [ShuffleUnit(width, width, 1) for _ in range(blocks - 1)]
        stages.append((nn.Sequential(*units), width, 2 ** (i + 1)))
        chans = width
    return CifarNet(conv_bn(kwargs.get("in_chans", 3), 24, 1), stages, conv_bn(chans, 1024, 1), 1024, **kwargs)


#: timm's names of the networks, what makes each, and of what.
NETWORKS: dict[str, tuple[Any, ...]] = {
    "cifar_resnet20": (resnet, BasicBlock, (3, 3, 3), 16, (16, 32, 64)),
    "cifar_resnet56": (resnet, BasicBlock, (9, 9, 9), 16, (16, 32, 64)),
    "cifar_resnet8x4": (resnet, BasicBlock, (1, 1, 1), 32, (64, 128, 256)),
    "cifar_resnet32x4": (resnet, BasicBlock, (5, 5, 5), 32, (64, 128, 256)),
    "cifar_resnet50": (resnet, Bottleneck, (3, 4, 6, 3), 64, (64, 128, 256, 512)),  # ImageNet's, with a CIFAR stem
    "cifar_wrn_40_1": (wide_resnet, 40, 1),
    "cifar_wrn_40_2": (wide_resnet, 40, 2),
    "cifar_mobilenetv2": (mobilenet_v2,),
    "cifar_shufflenetv1": (shufflenet_v1,),
    "cifar_shufflenetv2": (shufflenet_v2,),
}


def _register(name: str, make: Callable[..., CifarNet], *args: Any) -> None:
    def entry(pretrained: bool = False, **kwargs: Any) -> CifarNet:
        return _network(make, pretrained, kwargs, *args)

    entry.__name__ = name
    register_model(entry)


for _name, _made_of in NETWORKS.items():
    _register(_name, *_made_of)
