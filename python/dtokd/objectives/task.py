"""A timm `TrainingTask` for a student, classifier or detector, with any number of objectives and teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.models import group_parameters
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from ..confusion import ConfusionEvaluator
from ..errors import UsageError, reason_of
from ..stopwatch import Stopwatch
from .base import Objective, at_bound
from .cache import Keyed, TeacherCache, is_absent
from .phi import PhiS
from .taps import Outputs, Taps, in_float32, read
from .teacher import Teacher

#: From the student's and the teacher's outputs to indices [B, n] of their queries: which is which.
Match = Callable[[Outputs, Outputs], tuple[Tensor, Tensor]]


class Trainable(nn.Module):
    """The student and the objectives' heads: all that is trained, in one forward pass, as DDP wants it.

    Args:
        student: the student alone.
        heads: projectors, by objective.
        memories: what objectives remember, by objective: here to be saved, averaged and moved with the rest.
        taps: what is read of the student.
        views: by objective, positions of its maps among those of `taps`; all where it is missing.
    """

    def __init__(
        self,
        student: nn.Module,
        heads: dict[str, nn.Module],
        taps: Taps,
        views: Mapping[str, Sequence[int]] | None = None,
        memories: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.student, self.heads, self.taps, self._views = student, nn.ModuleDict(heads), taps, dict(views or {})
        self.memories = nn.ModuleDict(memories or {})

    def forward(self, images: Any, target: Any = None) -> tuple[Outputs, dict[str, Any]]:
        """The student's outputs and what each head makes of them."""
        outputs = read(self.student, images, self.taps, target)
        return outputs, {name: head(outputs.of_stages(self._views.get(name, ()))) for name, head in self.heads.items()}

    def no_weight_decay(self) -> set[str]:
        """The student's, with its new prefix, and what orthogonal projectors are made of: for timm's groups."""
        bare: Any = unwrap_model(self.student)
        own = bare.no_weight_decay() if hasattr(bare, "no_weight_decay") else ()
        made = {name for name, _ in self.named_parameters() if ".parametrizations." in name}
        return {f"student.{name}" for name in own} | made

    def group_matcher(self, coarse: bool = False) -> Any:
        """The student's layers, and the heads with the last of them (timm's layer decay asks for it)."""
        bare: Any = unwrap_model(self.student)
        if not hasattr(bare, "group_matcher"):
            return {}
        layers = group_parameters(bare, bare.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix("student."), last) if name.startswith("student.") else last


class DistillationTask(TrainingTask):
    """Task loss and objectives of one or several teachers, each on its own and as a weighted sum.

    `forward` returns {"loss": weighted sum, "output": the student's logits, "objectives": {"task": ..., ...}}, the
    task alone without a teacher. `get_trainable_module()` holds the student and the heads, `get_eval_model()` is the
    student, `get_task_state()` the heads' state, as in timm's tasks. The teachers are in neither, nor in `state_dict`.

    Args:
        student: a timm model, or a detector.
        criterion: of (logits, target); None for a detector, which computes its own loss.
        lessons: pairs of a teacher and its objectives.
        caches: of each teacher's outputs, which is asked where targets are `Keyed`; of none by default.
        match: pairs the queries of student and teacher before they are compared; None to compare by index.
        evaluator: makes what judges the student; None for timm's for classifiers.
        task_weight: in the sum.
        weights: in the sum, by objective.
        device, dtype: of the task.
    """

    trainable_module: Any

    def __init__(
        self,
        student: nn.Module,
        criterion: nn.Module | None,
        lessons: Sequence[tuple[Teacher, Sequence[Objective]]] = (),
        *,
        caches: Sequence[TeacherCache | None] = (),
        match: Match | None = None,
        evaluator: Callable[[], Any] | None = None,
        task_weight: float = 1.0,
        weights: dict[str, float] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=False)
        self.lessons = [(teacher, list(objectives)) for teacher, objectives in lessons]
        objectives = [o for _, several in self.lessons for o in several]
        heads = {o.name: o.head.to(self.device) for o in objectives if o.head is not None}
        taps = merge([o.student for o in objectives]) if objectives else Taps(logits=True)
        self._views = {o.name: _positions(o.student, taps) for o in objectives}
        memories = {o.name: o.memory.to(self.device) for o in objectives if o.memory is not None}
        self.trainable_module = Trainable(student, heads, taps, self._views, memories)
        self.criterion = None if criterion is None else criterion.to(self.device)
        self._match, self._evaluator = match, evaluator
        self.task_loss_weight = task_weight
        self.distill_loss_weights = dict(weights or {o.name: 1.0 for o in objectives})
        self.caches = list(caches) or [None] * len(self.lessons)
        self.watch = Stopwatch(self.device)  # of the teachers
        for teacher, _ in self.lessons:
            teacher.to(self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> DistillationTask:
        super()._apply(fn, *args, **kwargs)
        for teacher, _ in self.lessons:
            teacher.to(self.device)
        return self

    def forward(self, input: Any, target: Any) -> dict[str, Any]:
        """The losses of a batch.

        Args:
            input: images [B, channels, height, width], normalised for the student; for detectors `detect.batch.Images`.
            target: what the criterion, or the detector, takes; `Keyed`, for cached teachers.

        Returns:
            "loss", "output", "objectives": see the class.
        """
        keys = None
        if isinstance(target, Keyed):
            target, keys = target.target, target.keys
        outputs, projected = self.trainable_module(input, target)
        outputs = in_float32(outputs)
        losses: dict[str, Any] = {
            "task": outputs.loss if self.criterion is None else self.criterion(outputs.logits, target)
        }
        total = self.task_loss_weight * losses["task"]
        for (teacher, objectives), cache in zip(self.lessons, self.caches, strict=True):
            taps = merge([o.teacher for o in objectives])
            # the index is that of the student's places or queries
            with self.watch:
                taught, index = self._teach(teacher, cache, input, taps, keys)
            if self.training:
                with _exact(self.device):
                    for o in objectives:
                        o.remember(taught.of_stages(_positions(o.teacher, taps)))
            own, heads = outputs, projected
            if self._match is not None and taught.boxes is not None:
                index, theirs = self._match(outputs, taught)
                taught = taught.of_queries(theirs)
            if index is not None:
                own = outputs.of_queries(index)
                heads = {n: p.of_queries(index) if isinstance(p, Outputs) else p for n, p in projected.items()}
            for o in objectives:
                loss = self._loss(o, own, heads, taught, taps, target)
                total = total + self.distill_loss_weights[o.name] * loss
                losses[o.name] = loss
        return {
            "loss": total,
            "output": outputs.logits,
            "objectives": {name: at_bound(loss) for name, loss in losses.items()},
        }

    def _teach(
        self, teacher: Teacher, cache: TeacherCache | None, input: Any, taps: Taps, keys: Tensor | None
    ) -> tuple[Outputs, Tensor | None]:
        """The teacher's outputs for a batch, and [B, n] which places or queries they are of; None for all."""
        if cache is None or keys is None:
            return teacher(input, taps), None
        return cache(teacher, input, keys, self.device)

    def _loss(
        self, o: Objective, outputs: Outputs, projected: dict[str, Any], taught: Outputs, taps: Taps, target: Any
    ) -> Tensor:
        student, lesson = outputs.of_stages(self._views[o.name]), taught.of_stages(_positions(o.teacher, taps))
        with _exact(self.device):
            return o.loss(student, _in_float32(projected.get(o.name)), lesson, target)

    @torch.no_grad()
    def observe(self, input: Any, target: Any = None) -> None:
        """Let the objectives add a batch to the statistics that are fixed before training; then call `settle`.

        Args:
            input, target: as `forward` takes them; the target matters for cached teachers alone.
        """
        keys = target.keys if isinstance(target, Keyed) else None
        for (teacher, objectives), cache in zip(self.lessons, self.caches, strict=True):
            lacking = [o for o in objectives if not _settled(o)]
            if not lacking:
                continue
            taps = merge([o.teacher for o in lacking])
            taught, _ = self._teach(teacher, cache, input, taps, keys)
            for o in lacking:
                o.observe(taught.of_stages(_positions(o.teacher, taps)))

    def settle(self) -> None:
        """Fix the statistics by the batches of `observe`, of all ranks. All ranks call it.

        Raises:
            UsageError: a teacher's features give none.
        """
        for _, objectives in self.lessons:
            for o in objectives:
                if not _settled(o):
                    o.settle()

    @property
    def settled(self) -> bool:
        """Whether no objective lacks statistics that are fixed before training."""
        return all(_settled(o) for _, objectives in self.lessons for o in objectives)

    def create_evaluator(self, **options: Any) -> Any:
        """What judges the student, with timm's options."""
        return ConfusionEvaluator(device=self.device, **options) if self._evaluator is None else self._evaluator()

    @torch.no_grad()
    def check(self, images: Any) -> None:
        """Show every teacher and the student images, so that what does not fit is found before training.

        Args:
            images: as `forward` takes them; what is in them does not matter.

        Raises:
            UsageError: a teacher does not take an image of this size, or its features do not fit the student's.
        """
        target = torch.zeros(len(images), dtype=torch.long, device=self.device)
        was = self.trainable_module.training
        outputs, projected = self.trainable_module.eval()(images)
        self.trainable_module.train(was)
        outputs = in_float32(outputs)
        for (teacher, objectives), cache in zip(self.lessons, self.caches, strict=True):
            if is_absent(teacher.model):
                continue
            taps = merge([o.teacher for o in objectives])
            taught = teacher.try_on(images, taps)
            if cache is not None:
                cache.lay_out(taught)
            if self._match is not None and taught.boxes is not None:
                continue  # only after the match do both have as many queries
            for o in objectives:
                # classes were compared when the task was made; some models' logits are others while they are trained
                if o.student.pooled or o.student.stages:
                    self._fits(teacher, o, outputs, projected, taught, taps, target)

    def _fits(self, teacher: Teacher, o: Objective, outputs: Outputs, *rest: Any) -> None:
        """Raises UsageError: the loss cannot be computed."""
        try:
            self._loss(o, outputs, *rest)
        except UsageError:
            raise
        except (RuntimeError, IndexError, ValueError, TypeError, AssertionError) as error:
            raise UsageError(
                f"--kd-model-name: the features of teacher {teacher.name!r} cannot be brought to the student's for "
                f"{o.name}: {reason_of(error)}; choose --kd-student-stages and --kd-teacher-stages, another "
                "--kd-distill-type, or another teacher"
            ) from error

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> DistillationTask:
        """Wrap the student and the heads in DistributedDataParallel."""
        # what objectives remember is the same on all ranks: DDP would send it before each forward pass
        remembered = [n for n, _ in self.trainable_module.named_buffers() if n.startswith("memories.")]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self.trainable_module, remembered
        )
        if self.criterion is None:  # a detector may have layers that its own loss does not reach
            ddp_kwargs.setdefault("find_unused_parameters", True)
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(  # timm's signature, which is not torch's
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the student with its heads, and for evaluation the student; --kd-teacher-compile is the teacher's."""
        student: Any = self.get_eval_model()
        evaluated: Any = torch.compile(student, backend=backend, mode=mode, **compile_kwargs)
        self.eval_model = evaluated
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return evaluated

    def _trainable(self, module: nn.Module | None, ema: bool) -> Trainable | None:
        found = module if module is not None else self.get_trainable_module(ema=ema)
        found = None if found is None else unwrap_model(found)
        return found if isinstance(found, Trainable) else None

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The student, or its average."""
        compiled = "eval_model_ema" if ema else "eval_model"
        if module is None and compiled in self._modules:
            return self._modules[compiled]
        trainable = self._trainable(module, ema)
        return module if trainable is None else trainable.student

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """{"heads": the heads' state_dict, "memories": the objectives'}, each only where there are any."""
        trainable = self._trainable(module, ema)
        if trainable is None:
            return {}
        parts = {"heads": trainable.heads, "memories": trainable.memories}
        return {name: part.state_dict() for name, part in parts.items() if len(part)}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """What `get_task_state` gave.

        Raises:
            RuntimeError: the heads are others, or there is no EMA.
        """
        trainable = self._trainable(module, ema)
        if trainable is None:
            raise RuntimeError("load_task_state: there is no EMA to load into; call setup_ema first")
        if state or strict:
            trainable.heads.load_state_dict((state or {}).get("heads", {}), strict=strict)
            trainable.memories.load_state_dict((state or {}).get("memories", {}), strict=strict)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The student's parameters (agc: but the classifier's) and the heads'."""
        trainable = self._trainable(None, False)
        assert trainable is not None
        student = list(trainable.student.parameters())
        return [*(student[:-2] if exclude_head else student), *trainable.heads.parameters()]


def _exact(device: torch.device | None) -> torch.autocast:
    """Losses are computed in float32, also where the student's forward pass is not."""
    return torch.autocast("cpu" if device is None else device.type, enabled=False)


def _in_float32(projected: Any) -> Any:
    if isinstance(projected, Outputs):
        return in_float32(projected)
    if isinstance(projected, (list, tuple)):
        return type(projected)(_in_float32(each) for each in projected)
    return projected.float() if isinstance(projected, Tensor) else projected


def _settled(objective: Objective) -> bool:
    return not isinstance(objective.memory, PhiS) or objective.memory.settled


def merge(taps: Sequence[Taps]) -> Taps:
    """What serves all of several objectives.

    Raises:
        UsageError: they want different pooling.
    """
    pools = {t.pooled for t in taps if t.pooled}
    if len(pools) > 1:
        raise UsageError(f"objectives of one model want different pooled features: {sorted(pools)}; choose one")
    stages = sorted({index for t in taps for index in t.stages})
    return Taps(any(t.logits for t in taps), pools.pop() if pools else "", tuple(stages))


def _positions(own: Taps, merged: Taps) -> tuple[int, ...]:
    return tuple(merged.stages.index(index) for index in own.stages)
