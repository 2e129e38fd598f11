"""What objectives read of a model, classifier or detector: logits, pooled features, maps, tokens, boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from ..errors import UsageError


class NoGrid(UsageError):
    """A model's features are not maps, so that they have no place in an image."""


@dataclass(frozen=True)
class Taps:
    """Which outputs are wanted.

    Attributes:
        logits: the classifier's output.
        pooled: "" for none, "head" for what the classifier reads, "mean" for the mean over positions.
        stages: indices of the maps, as `forward_intermediates` counts them.
    """

    logits: bool = False
    pooled: str = ""
    stages: tuple[int, ...] = ()


class Outputs(NamedTuple):
    """A model's outputs; what was not asked for, or what this kind of model has not, is None or empty.

    N counts a detector's predictions per image: queries, or places of all levels.

    Attributes:
        logits: [B, classes]; of detectors [B, N, classes].
        token_logits: [B, classes] of the distillation head, if the model has one and it is being trained.
        pooled: [B, width].
        maps: [B, channels, height, width] each, shallow to deep; a transformer's patch tokens on their grid, a
            detector's levels.
        boxes: [B, N, 4]; of queries centre, width and height relative to the image, of dense detectors what their
            box coder decodes.
        quality: [B, N] logits of FCOS's centerness.
        body: [B, N, width] detection tokens after their first look at the image.
        neck: [B, layers, N, width] detection tokens after each later layer.
        loss: a detector's own training loss, where it was given the targets.
    """

    logits: Tensor | None = None
    token_logits: Tensor | None = None
    pooled: Tensor | None = None
    maps: tuple[Tensor, ...] = ()
    boxes: Tensor | None = None
    quality: Tensor | None = None
    body: Tensor | None = None
    neck: Tensor | None = None
    loss: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        """With every tensor changed in the same way."""
        fields: Iterator[Any] = (
            tuple(map(change, x)) if isinstance(x, tuple) else None if x is None else change(x) for x in self
        )
        return Outputs(*fields)

    def of_stages(self, positions: Sequence[int]) -> Outputs:
        """With the maps at these positions; with all of them where there are no positions."""
        return self._replace(maps=tuple(self.maps[p] for p in positions)) if positions else self

    def of_queries(self, index: Tensor) -> Outputs:
        """With the queries at [B, n]."""

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[torch.arange(len(x), device=x.device)[:, None], index]

        neck = None if self.neck is None else pick(self.neck.transpose(1, 2))
        return self._replace(
            logits=pick(self.logits),
            boxes=pick(self.boxes),
            quality=pick(self.quality),
            body=pick(self.body),
            neck=None if neck is None else neck.transpose(1, 2),
        )


def read(model: nn.Module, images: Any, taps: Taps, target: Any = None) -> Outputs:
    """One forward pass that keeps what `taps` names.

    Args:
        model: of timm, with `forward_features`, `forward_head` and, for maps, `forward_intermediates`; or a detector,
            with `observe`.
        images: [B, channels, height, width], normalised; for a detector `detect.batch.Images`.
        taps: what to keep. A transformer's maps are its patch tokens after its last normalisation layer, without class,
            distillation and register tokens.
        target: of the batch, for detectors, which compute their own loss.

    Raises:
        NoGrid: maps are wanted of a model whose tokens are on no grid.
    """
    module: Any = model  # timm models are typed as modules
    if hasattr(module, "observe"):
        observed: Outputs = module.observe(images, target)
        return observed.of_stages(taps.stages)
    if not taps.pooled and not taps.stages:
        return Outputs(*_split(model(images)))
    maps: Sequence[Tensor] = ()
    if taps.stages:
        features, maps = _maps_of(module, images, taps.stages)
    else:
        features = module.forward_features(images)
    # the order of timm's FeatureDistillationTask: with dropout in the head it also is that of the random numbers
    logits, token_logits = _split(module.forward_head(features)) if taps.logits else (None, None)
    pooled = None
    if taps.pooled == "head":
        pooled = module.forward_head(features, pre_logits=True)
    elif taps.pooled == "mean":
        pooled = _mean_over_positions(model, features)
    return Outputs(logits, token_logits, pooled, tuple(maps))


def _maps_of(module: Any, images: Tensor, stages: Sequence[int]) -> tuple[Tensor, Sequence[Tensor]]:
    """Raises NoGrid, see `read`."""
    features, maps = module.forward_intermediates(images, indices=list(stages), norm=True, output_fmt="NCHW")
    if bad := [tuple(m.shape) for m in maps if m.ndim != 4]:
        raise NoGrid(
            f"--kd-distill-type: {type(unwrap_model(module)).__name__} gives features of shape {bad[0]}, which are on "
            "no grid; take --kd-distill-type feature, which reads pooled features, or another model"
        )
    return features, maps


def _split(output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    return output if isinstance(output, tuple) else (output, None)


def _mean_over_positions(model: nn.Module, features: Tensor) -> Tensor:
    """[B, width] of a map [B, C, H, W], [B, H, W, C], or of tokens [B, N, C] without class and distillation tokens."""
    if features.ndim == 3:
        prefix = getattr(unwrap_model(model), "num_prefix_tokens", 0)
        return features[:, prefix:].mean(1)
    if features.ndim == 4:
        last = getattr(unwrap_model(model), "output_fmt", "NCHW") == "NHWC"
        return features.mean((1, 2) if last else (2, 3))
    if features.ndim == 2:
        return features
    raise UsageError(
        f"--kd-feature-pool mean: features of {type(unwrap_model(model)).__name__} have shape {tuple(features.shape)}; "
        "pass --kd-feature-pool head"
    )


def pooled_width(model: nn.Module, pool: str) -> int:
    """Channels of the pooled features.

    Raises:
        UsageError: the model has no such number.
    """
    bare = unwrap_model(model)
    names = ("head_hidden_size", "num_features") if pool == "head" else ("num_features",)
    for name in names:
        if isinstance(width := getattr(bare, name, None), int):
            return width
    raise UsageError(
        f"feature distillation: {type(bare).__name__} has no {' or '.join(names)}; "
        "pass --kd-student-feature-dim and --kd-teacher-feature-dim"
    )


def choose_stages(
    model: nn.Module, count: int | None, given: Sequence[int] | None, who: str
) -> tuple[tuple[int, ...], list[int]]:
    """Indices of the stages to compare, and their channels.

    A model with a pyramid (CNN, Swin) gives its last `count` stages; one of a single resolution (ViT) `count` blocks
    at equal distance that end with the last.

    Args:
        model: a timm model.
        count: how many; None for all.
        given: the user's own indices; None chooses.
        who: "student" or "teacher", for messages.

    Raises:
        UsageError: no `forward_intermediates`, too few stages, or an index that does not exist.
    """
    bare: Any = unwrap_model(model)
    info = getattr(bare, "feature_info", None)
    if not hasattr(bare, "forward_intermediates") or not info:
        raise UsageError(
            f"--kd-distill-type: the {who} {type(bare).__name__} has no maps (forward_intermediates); take another "
            "model, or --kd-distill-type feature of dtokd train, which reads pooled features"
        )
    stages: list[dict[str, Any]] = list(getattr(info, "info", info))
    total = len(stages)
    if given is not None:
        if any(not 0 <= index < total for index in given) or list(given) != sorted(set(given)):
            raise UsageError(
                f"--kd-{who}-stages: got {list(given)}, but {type(bare).__name__} has stages 0 to {total - 1}; "
                "give rising indices of these"
            )
        chosen = list(given)
    elif count is None:
        chosen = list(range(total))
    elif not 1 <= count <= total:
        raise UsageError(
            f"--kd-stages: got {count}, but the {who} {type(bare).__name__} has {total}; pass 1 to {total}"
        )
    elif len({stage.get("reduction") for stage in stages}) == 1:
        chosen = [(i + 1) * total // count - 1 for i in range(count)]
    else:
        chosen = list(range(total - count, total))
    return tuple(chosen), [int(stages[index]["num_chs"]) for index in chosen]


def in_float32(outputs: Outputs) -> Outputs:
    """For losses: what autocast made of the outputs, in float32, as torch does by itself for most losses on a GPU."""
    return outputs.each(Tensor.float)
