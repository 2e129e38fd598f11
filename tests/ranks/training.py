"""What each rank does in the tests of `dtokd train` on several ranks.

As a script, for torchrun: `dtokd`, whose rank 1 is killed in its sixth step, in its first life.
"""

import contextlib
import io
import os
import random
import signal
import sys

import numpy as np
import torch
from dtokd.cli import main
from dtokd.train import run, state
from timm.utils import unwrap_model


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
    step, count = run.Engine._step, [0]

    def counted(engine):
        count[0] += 1
        work(engine, count[0])
        step(engine)

    return patched(run.Engine, "_step", counted)


def train(rank, size, argv, signals=None, spoils=None):
    """`dtokd train` on this rank.

    Args:
        rank: of this process.
        size: how many there are.
        argv: of the command.
        signals: {rank: the step in which it gets SIGTERM}
        spoils: {rank: the step in which its losses are NaN}

    Returns:
        Exit code, what was said, student's state_dict, the next random numbers.
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
        module = unwrap_model(engines[-1].task.get_trainable_module())
        weights = {name: value.clone() for name, value in module.state_dict().items()}
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    return code, out.getvalue() + err.getvalue(), weights, drawn


def _spoiled(number):
    """The losses of that call are NaN, as from a broken image."""
    forward, count = run.TrainingTask.__call__, [0]

    def call(task, *args, **kwargs):
        result = forward(task, *args, **kwargs)
        count[0] += 1
        if count[0] == number:
            result = {**result, "objectives": {n: v * float("nan") for n, v in result["objectives"].items()}}
        return result

    return patched(run.TrainingTask, "__call__", call)


if __name__ == "__main__":
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def die(engine, number):
        if first_life and os.environ["RANK"] == "1" and number == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    with each_step(die):
        sys.exit(main(sys.argv[1:]))
