"""What each rank does in the tests of `dtokd train` and `dtokd detect` on several ranks.

As a script, for torchrun: `dtokd`, whose rank 1 is killed in its sixth step, in its first life.
"""

import argparse
import contextlib
import io
import os
import random
import signal
import sys

import numpy as np
import torch
from dtokd.cli import main
from dtokd.detect.batch import Detections
from dtokd.detect.data import read_split
from dtokd.detect.evaluate import CocoEvaluator
from dtokd.train import state
from dtokd.train.engine import Engine
from dtokd.train.world import join
from timm.task import TrainingTask


@contextlib.contextmanager
def patched(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)


def each_step(work):
    """Calls work(engine, number) before each optimizer step."""
    step, count = Engine._step, [0]

    def counted(engine):
        count[0] += 1
        work(engine, count[0])
        step(engine)

    return patched(Engine, "_step", counted)


def train(rank, size, argv, signals=None, spoils=None):
    """`dtokd train` or `dtokd detect` on this rank.

    Args:
        rank: of this process.
        size: how many there are.
        argv: of the command.
        signals: {rank: the step in which it gets SIGTERM}
        spoils: {rank: the step in which its losses are NaN}

    Returns:
        Exit code, what was said, the state_dict of the student, and of its average, the next random numbers.
    """
    engines, out, err = [], io.StringIO(), io.StringIO()
    collect = state.collect

    def disturb(engine, number):
        if (signals or {}).get(rank) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    def noted(engine, *args):
        engines.append(engine)
        return collect(engine, *args)

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(patched(state, "collect", noted))
        stack.enter_context(each_step(disturb))
        if spoils is not None:
            stack.enter_context(_spoiled(spoils.get(rank)))
        code = main(argv)
    weights = {}
    if engines:
        for kind, module in state.modules(engines[-1].task).items():
            prefix = "ema." if kind == "ema" else ""
            weights |= {prefix + name: value.clone() for name, value in module.state_dict().items()}
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    return code, out.getvalue() + err.getvalue(), weights, drawn


def judged(rank, size, root):
    """COCO's figures of made-up detections, of which each rank has seen a part, and an image of another rank's."""
    options = argparse.Namespace(data_dir=root, annotations="annotations/instances_{split}.json")
    split = read_split(options, "val")
    with join("cpu", 60) as world:
        evaluator = CocoEvaluator(split, world)
        images = split.content["images"]
        for image in [*images[rank::size], images[0]]:
            generator = torch.Generator().manual_seed(image["id"])
            known = [a for a in split.content["annotations"] if a["image_id"] == image["id"]] * 2
            boxes = torch.tensor([a["bbox"] for a in known]).reshape(-1, 4)
            boxes = boxes + torch.randn(boxes.shape, generator=generator)
            boxes[:, 2:] += boxes[:, :2]
            # few values, so that many are equal
            scores = (torch.rand(len(known), generator=generator) * 4).round() / 4
            labels = torch.tensor([a["category_id"] for a in known], dtype=torch.int64)
            own = (image["height"], image["width"])
            found = {"boxes": boxes, "scores": scores, "labels": labels}
            target = {"image_id": split.image_ids[image["id"]], "size": own, "original": own}
            evaluator.update(Detections([found]), [target])
        return evaluator.compute(distributed=size > 1)


def _spoiled(number):
    """The losses of that call are NaN, as from a broken image."""
    forward, count = TrainingTask.__call__, [0]

    def call(task, *args, **kwargs):
        result = forward(task, *args, **kwargs)
        count[0] += 1
        if count[0] == number:
            result = {**result, "objectives": {n: v * float("nan") for n, v in result["objectives"].items()}}
        return result

    return patched(TrainingTask, "__call__", call)


if __name__ == "__main__":
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def die(engine, number):
        if first_life and os.environ["RANK"] == "1" and number == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    with each_step(die):
        sys.exit(main(sys.argv[1:]))
