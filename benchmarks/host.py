"""Host time of one step on a GPU, without one: the package's own operations, compiled for launches that do nothing.

    python -m benchmarks.host --model deit_tiny

What is left is what the host does in each step: Python, unpacking the lists of tensors, planning the launches. On a GPU
a step of a small model takes no less. Beside it stands what torch's fused AdamW does in Python, its kernel replaced by
nothing too. Processor time of the thread; of many steps the tenth part that is least disturbed. Fails where a step
takes longer than torch's.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dtokd_kernels import implementations
from dtokd_kernels.sources import Exact
from dtokd_kernels.sources.lag import _Finite
from dtokd_kernels.types import Balance
from tests import emulated

from .cases import Case, TwoLaunches, adamw, optimizer_of, shapes_of

STEPS = 300
WARM = 20


def microseconds(step: Callable[[], object]) -> float:
    """The 10 % quantile of a step's processor time."""
    taken = []
    gc.disable()
    try:
        for _ in range(WARM + STEPS):
            before = time.thread_time_ns()
            step()
            taken.append((time.thread_time_ns() - before) / 1e3)
    finally:
        gc.enable()
    return statistics.quantiles(taken[WARM:], n=10)[0]


def measure(model: str, folder: Path) -> dict[str, float]:
    """Microseconds of a step of each kind."""
    library = emulated.build(folder, "-O3", "-DDTOKD_NO_LAUNCHES")
    found: dict[str, float] = {}
    record = implementations._record

    def filled(grams: Tensor, values: Tensor, flags: Tensor) -> Balance:
        """What no launch has written: a step that is not skipped."""
        return record(grams, values.fill_(1.0), flags.zero_())

    implementations._record = filled
    with emulated.emulated_cuda(library):
        for name, source in {"one launch": Exact(), "two launches": TwoLaunches(), "lag": "lag"}.items():
            case = Case.build(shapes_of(model), "interior")
            optimizer = optimizer_of(case, gram=source, backend="cuda")
            if source == "lag":
                watch = _Finite(optimizer._options)
                watch._objectives, watch._totals = 2, dict.fromkeys(range(2), torch.ones(1, 1, dtype=torch.float64))
                optimizer._sets.watch = watch
            found[f"DTOAdamW, {name}"] = microseconds(optimizer.step)
    implementations._record = record
    case = Case.build(shapes_of(model), "interior")
    case.set_grads(case.grads[0])
    own = torch._fused_adamw_
    torch._fused_adamw_ = lambda *args, **kwargs: None
    try:
        found["torch fused AdamW, Python only"] = microseconds(adamw(case, fused=True).step)
    finally:
        torch._fused_adamw_ = own
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny", help="whose parameters' shapes are used")
    model = parser.parse_args().model
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(model, Path(folder))
    for name, value in found.items():
        print(f"{model}: {name}: {value:.0f} us")
    *_, torchs = found.values()
    raise SystemExit(max(found.values()) > torchs)


if __name__ == "__main__":
    main()
