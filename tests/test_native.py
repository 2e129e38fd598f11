"""The CPU kernels: threads, memory layouts, and gradients that are left out."""

import pytest
import torch

from dtokd_kernels import backends, reference
from dtokd_kernels.types import Role

from .inputs import CHUNK
from .updates import Update, flag, gradient_rows, run

pytestmark = pytest.mark.skipif(backends.missing("cpu") is not None, reason="no extension")

SIZES = (3, 0, 17, CHUNK + 5000)
NUMBERS = {
    "adamw": {
        "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8, "maximize": False, "amsgrad": False,
    },
    "sgd": {
        "lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "nesterov": False, "maximize": False,
        "first": False,
    },
}  # fmt: skip
WEIGHTS = torch.tensor([0.4, 0.6], dtype=torch.float64)


@pytest.fixture
def cpu():
    return backends.select(torch.device("cpu"), "cpu")


def tensors(seed, sizes=SIZES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=generator).to(dtype) for n in sizes]


def update(rule, grads=None, reach=(0, 1)):
    state = {"momentum_buffer": tensors(3)}
    if rule == "adamw":
        steps = [torch.tensor(3.0) for _ in SIZES]
        state = {"exp_avg": tensors(3), "exp_avg_sq": tensors(4), "step": steps}
    return Update(rule, Role.SHARED, reach, tensors(2), grads or [tensors(0), tensors(1)], state, NUMBERS[rule])


@pytest.mark.parametrize("rule", NUMBERS)
def test_same_bits_for_any_number_of_threads(cpu, rule):
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            one = update(rule)
            run(cpu, [one], WEIGHTS.expand(3, -1), flag())
            combined = [torch.empty_like(p) for p in one.params]
            cpu.combine(combined, gradient_rows(one.grads), WEIGHTS.expand(3, -1))
            results.append(torch.cat([*one.tensors()[: 2 * len(SIZES)], *combined]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_steps_bump_versions_so_that_autograd_notices(cpu):
    one = update("adamw")
    versions = [p._version for p in one.params]
    run(cpu, [one], WEIGHTS.expand(3, -1), flag())
    assert all(p._version > v for p, v in zip(one.params, versions, strict=True))


def layouts():
    """A tensor of each layout, all of shape (2, 3, 4, 5)."""
    base = torch.arange(120.0).reshape(2, 3, 4, 5) / 100
    wide = torch.zeros(2, 3, 4, 10)
    wide[..., ::2] = base
    return {
        "contiguous": base.clone(),
        "channels_last": base.clone(memory_format=torch.channels_last),
        "transposed": base.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "gaps": wide[..., ::2],
        "expanded": base[:1, :1, :1, :1].expand(2, 3, 4, 5),
    }


@pytest.mark.parametrize("param", ["contiguous", "channels_last", "transposed", "gaps"])
@pytest.mark.parametrize("first", layouts())
@pytest.mark.parametrize("second", ["contiguous", "channels_last"])
@pytest.mark.parametrize("state", ["contiguous", "channels_last"])
def test_layouts_that_differ_give_the_same_step(cpu, param, first, second, state):
    def after(backend):
        p, m, v = layouts()[param], layouts()[state].clone(), layouts()[state].clone()
        step = torch.tensor(2.0)
        moments = {"exp_avg": [m], "exp_avg_sq": [v], "step": [step]}
        grads = [[layouts()[first]], [layouts()[second]]]
        one = Update("adamw", Role.SHARED, (0, 1), [p], grads, moments, NUMBERS["adamw"])
        run(backend, [one], WEIGHTS.expand(3, -1), flag())
        return p, m, v, step

    for got, expected in zip(after(cpu), after(backends.REFERENCE), strict=True):
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-7)
    rows = [[layouts()[first]], [layouts()[second]]]
    assert torch.allclose(cpu.gram(gradient_rows(rows), 2)[Role.SHARED], reference.gram(rows), rtol=1e-14)


def test_a_vertex_does_not_read_the_gradient_it_leaves_out(cpu):
    poisoned = [torch.full((n,), torch.nan) for n in SIZES]
    both, one = update("sgd", [tensors(0), poisoned]), update("sgd", [tensors(0)], (0,))
    table = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(3, -1)
    run(cpu, [both], table, flag())
    run(cpu, [one], table[:, :1], flag())
    assert torch.equal(torch.cat(both.params), torch.cat(one.params))
