"""Detectors of transformers' DETR family: one wrapper, the family's differences in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from ...errors import UsageError, reason_of
from ...objectives.taps import Outputs
from ...texts import parse_json
from ..batch import Detections, Images, Target
from .base import MEAN, MOST, STD, Detector, take_any_image

#: Kinds whose classes compete in a softmax with "no object".
SOFTMAX = ("detr", "yolos")
#: Kinds that do not read the mask: their boxes are parts of the padded image.
UNMASKED = ("rt_detr", "rt_detr_v2", "d_fine")
#: Kinds that the wrapper knows to read.
KINDS = ("detr", "conditional_detr", "dab-detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine", "yolos")


class HFDetector(Detector):
    """A `transformers` model for object detection.

    Args:
        net: with `config.model_type` one of `KINDS`.
        mean, std: of its images.
        class_weight: of the classification loss in the sum, which transformers has at 1.
    """

    dense = False

    def __init__(self, net: Any, mean: Any = MEAN, std: Any = STD, class_weight: float = 1.0) -> None:
        super().__init__(mean, std)
        self.class_weight = class_weight
        self.net, config = net, net.config
        take_any_image(net)
        net.loss_function = _of_finite_boxes(net.loss_function)
        self.kind: str = config.model_type
        self.sigmoid = self.kind not in SOFTMAX
        self.queries: int = config.num_detection_tokens if self.kind == "yolos" else config.num_queries
        self.classes = config.num_labels
        self.token_width = getattr(config, "d_model", None) or config.hidden_size
        if self.kind == "yolos":
            levels = 1
        elif self.kind in ("rt_detr", "rt_detr_v2", "d_fine"):
            levels = len(config.encoder_in_channels)
        else:
            levels = config.num_feature_levels if self.kind == "deformable_detr" else 1
        width = getattr(config, "encoder_hidden_dim", None) or self.token_width
        self.widths = [width] * levels

    def _run(self, images: Images, **labels: Any) -> Any:
        mask = {} if self.kind == "yolos" else {"pixel_mask": images.mask.long()}
        return self.net(pixel_values=self.normalised(images), output_hidden_states=True, **mask, **labels)

    def observe(self, images: Images, targets: list[Target] | None = None) -> Outputs:
        """See `Detector`.

        The loss: Hungarian matching with the objects, then classes, L1 and GIoU, of all layers, with the weights of the
        config.
        """
        if targets is None:
            return self._outputs(self._run(images), images)
        padded = images.pixels.shape[-2:]
        labels = [
            {"class_labels": t["labels"], "boxes": _relative(t["boxes"], padded if self.kind in UNMASKED else size)}
            for t, size in zip(targets, images.sizes, strict=True)
        ]
        result = self._run(images, labels=labels)
        loss = result.loss
        if self.class_weight != 1:
            classes = [value for name, value in result.loss_dict.items() if name.startswith("loss_ce")]
            loss = loss + (self.class_weight - 1) * torch.stack(classes).sum()
        return self._outputs(result, images)._replace(loss=loss)

    def _outputs(self, result: Any, images: Images) -> Outputs:
        """In training RT-DETR has denoising queries before its own."""
        n = self.queries
        logits, boxes = result.logits[:, -n:], result.pred_boxes[:, -n:]
        if self.kind in UNMASKED:
            height, width = images.pixels.shape[-2:]
            parts = [[width / w, height / h] * 2 for h, w in images.sizes]
            boxes = boxes * boxes.new_tensor(parts)[:, None]
        last = result.last_hidden_state
        if self.kind == "yolos":
            patches = last[:, 1 : last.shape[1] - n]
            return Outputs(logits, boxes=boxes, maps=self._grids(patches, images), body=last[:, -n:])
        layers = getattr(result, "intermediate_hidden_states", None)
        if layers is None:  # the first of the hidden states is the input
            layers = torch.stack(result.decoder_hidden_states[1:], dim=1)
        layers = layers[:, :, -n:]
        memory = result.encoder_last_hidden_state
        maps = tuple(memory) if isinstance(memory, (list, tuple)) else self._grids(memory, images)
        if layers.shape[1] == 1:
            return Outputs(logits, boxes=boxes, maps=maps, neck=layers)
        return Outputs(logits, boxes=boxes, maps=maps, body=layers[:, 0], neck=layers[:, 1:])

    def _grids(self, tokens: Tensor, images: Images) -> tuple[Tensor, ...]:
        """Tokens [B, N, width] of one or several levels as maps; strides double from level to level."""
        height, width = images.pixels.shape[-2:]
        for first in (4, 8, 16, 32, 64):
            strides = [first << i for i in range(len(self.widths))]
            shapes = [(-(-height // s), -(-width // s)) for s in strides]
            if self.kind == "yolos":  # patches that do not fit are left out
                p = self.net.config.patch_size
                shapes = [(height // p, width // p)]
            if sum(h * w for h, w in shapes) == tokens.shape[1]:
                parts = tokens.split([h * w for h, w in shapes], dim=1)
                return tuple(p.mT.unflatten(-1, s) for p, s in zip(parts, shapes, strict=True))
        raise UsageError(
            f"--kd-distill-type: {self.kind} has {tokens.shape[1]} patch tokens for images of {height} x {width}, "
            "which are no grid of a known stride; take --kd-distill-type prediction"
        )

    def detect(self, outputs: Outputs, images: Images) -> Detections:
        """The best pairs of query and class."""
        scores = self.probabilities(outputs).flatten(1)
        best, index = scores.topk(min(MOST, scores.shape[1]), dim=1)
        assert outputs.boxes is not None
        found = []
        for i, size in enumerate(images.sizes):
            query, label = index[i] // self.classes, index[i] % self.classes
            scale = outputs.boxes.new_tensor([size[1], size[0]] * 2).float()
            boxes = box_convert(outputs.boxes[i, query].float(), "cxcywh", "xyxy") * scale
            found.append({"boxes": torch.minimum(boxes.clamp_min(0), scale), "scores": best[i], "labels": label})
        return Detections(found)

    @property
    def class_names(self) -> dict[int, str]:
        """As the checkpoint calls them."""
        return {int(index): str(name) for index, name in self.net.config.id2label.items()}


def _of_finite_boxes(loss_function: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of transformers' that is NaN where the predictions are not finite, instead of an error of its matching."""

    def loss(logits: Tensor, labels: Any, device: Any, boxes: Tensor, *more: Any, **named: Any) -> Any:
        try:
            return loss_function(logits, labels, device, boxes, *more, **named)
        except ValueError:
            given = [x for x in (logits, boxes, *more, *named.values()) if isinstance(x, Tensor)]
            if all(bool(x.isfinite().all()) for x in given):
                raise
            nothing = (logits.sum() + boxes.sum()) * torch.nan
            return nothing, {"loss_ce": nothing}, None

    return loss


def _relative(boxes: Tensor, size: Sequence[int]) -> Tensor:
    return box_convert(boxes, "xyxy", "cxcywh") / boxes.new_tensor([size[1], size[0]] * 2)


def load_folder(folder: Path, option: str) -> HFDetector:
    """A checkpoint directory of transformers; nothing is downloaded, and no code in it runs.

    Args:
        folder: with config.json, weights, and perhaps preprocessor_config.json, which says how images are normalised.
        option: what the user gave it by, for messages.

    Raises:
        UsageError: it is none, or of a kind that the wrapper cannot read.
    """
    from transformers import AutoConfig, AutoModelForObjectDetection

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"{option}: {folder} is no checkpoint of transformers: {reason_of(error)}") from error
    if config.model_type not in KINDS:
        raise UsageError(f"{option}: {folder} holds a {config.model_type}; known are {', '.join(KINDS)}")
    if hasattr(config, "disable_custom_kernels"):
        config.disable_custom_kernels = True
    try:
        net = AutoModelForObjectDetection.from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"{option}: the weights in {folder} cannot be loaded: {reason_of(error)}") from error
    file = folder / "preprocessor_config.json"
    try:
        told: dict[str, Any] = dict(parse_json(file.read_text(encoding="utf-8"))) if file.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{option}: {file} cannot be read: {reason_of(error)}") from error
    if told.get("do_normalize", True):
        return HFDetector(net, told.get("image_mean", MEAN), told.get("image_std", STD))
    return HFDetector(net, (0.0,) * 3, (1.0,) * 3)
