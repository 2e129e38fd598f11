"""The C++ operations as torch sees them: schemas, fake kernels, threads, memory layouts, what they refuse."""

import pytest
import torch

from dtokd_kernels import backends, native, reference
from dtokd_kernels.types import Role, Update

from .inputs import CHUNK

pytestmark = pytest.mark.skipif(backends.missing("cpu") is not None, reason=f"no extension: {native.missing}")

SIZES = (3, 0, 17, CHUNK + 5000)
ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8, "maximize": False}
SGD = {
    "lr": 1e-2,
    "momentum": 0.9,
    "dampening": 0.1,
    "weight_decay": 0.1,
    "nesterov": False,
    "maximize": False,
    "first": False,
}


def tensors(seed, sizes=SIZES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=generator).to(dtype) for n in sizes]


def coefficients():
    return torch.tensor([0.4, 0.6], dtype=torch.float64)


def flag(value=False):
    return torch.tensor(value)


def calls():
    gram = torch.tensor([[18.0, -22.0], [-22.0, 38.0]], dtype=torch.float64)
    steps = [torch.tensor(1.0) for _ in SIZES]
    made = {
        "gram": ((tensors(0) + tensors(1), 2), {}),
        "min_norm_weights": ((gram, True, torch.tensor([True, True])), {}),
        "balance": ((gram, None, gram, torch.ones(2).double(), None, True, True, False, 1.0, 1e-8, 2.0**60), {}),
        "combine_": ((tensors(2), tensors(0) + tensors(1), coefficients()), {}),
        "adamw_step_": (
            (tensors(2), tensors(0) + tensors(1), tensors(3), tensors(4), [], steps, coefficients(), flag()),
            ADAMW,
        ),
        "sgd_step_": ((tensors(2), tensors(0) + tensors(1), tensors(3), coefficients(), flag()), SGD),
    }
    # updates that also return the Gram matrix of what they read
    made |= {f"gram_{name}": made[name] for name in ("adamw_step_", "sgd_step_")}
    return made


@pytest.mark.parametrize("name", calls())
def test_opcheck(name):
    args, kwargs = calls()[name]
    torch.library.opcheck(getattr(torch.ops.dtokd, name).default, args, kwargs)


def test_every_operation_is_checked():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("dtokd::")}
    assert names - {"instructions"} == set(calls())


@pytest.mark.parametrize("name", ["adamw_step_", "sgd_step_", "combine_"])
def test_steps_have_the_same_bits_for_any_number_of_threads(name):
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            args, kwargs = calls()[name]
            getattr(torch.ops.dtokd, name).default(*args, **kwargs)
            results.append(torch.cat(args[0]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def run(backend, update, weights):
    table = weights.expand(3, -1)
    backend.run_updates([update], table, flag())


def test_steps_bump_versions_so_that_autograd_notices():
    params, grads = tensors(2), [tensors(0), tensors(1)]
    moments = {"exp_avgs": tensors(3), "exp_avg_sqs": tensors(4), "max_exp_avg_sqs": []}
    state = moments | {"state_steps": [torch.tensor(3.0) for _ in SIZES]}
    versions = [p._version for p in params]
    run(
        native,
        Update("adamw_step", Role.SHARED, (0, 1), params, grads, state, ADAMW | {"amsgrad": False}),
        coefficients(),
    )
    assert all(p._version > v for p, v in zip(params, versions, strict=True))


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
def test_layouts_that_differ_give_the_same_step(param, first, second, state):
    def after(backend):
        p, m, v = layouts()[param], layouts()[state].clone(), layouts()[state].clone()
        step = torch.tensor(2.0)
        moments = {"exp_avgs": [m], "exp_avg_sqs": [v], "max_exp_avg_sqs": [], "state_steps": [step]}
        grads = [[layouts()[first]], [layouts()[second]]]
        run(
            backend,
            Update("adamw_step", Role.SHARED, (0, 1), [p], grads, moments, ADAMW | {"amsgrad": False}),
            coefficients(),
        )
        return p, m, v, step

    for got, expected in zip(after(native), after(reference), strict=True):
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-7)
    rows = [[layouts()[first]], [layouts()[second]]]
    assert torch.allclose(native.gram(rows), reference.gram(rows), rtol=1e-14)


def test_a_vertex_does_not_read_the_gradient_it_leaves_out():
    params, poisoned = tensors(2), [torch.full((n,), torch.nan) for n in SIZES]
    expected = tensors(2)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
    both, one = ({"momentum_buffers": tensors(3)} for _ in range(2))
    run(native, Update("sgd_step", Role.SHARED, (0, 1), params, [tensors(0), poisoned], both, SGD), weights)
    run(native, Update("sgd_step", Role.SHARED, (0,), expected, [tensors(0)], one, SGD), weights[:1])
    assert torch.equal(torch.cat(params), torch.cat(expected))


def test_wrong_sizes_are_refused_before_anything_changes():
    args, kwargs = calls()["adamw_step_"]
    params, grads, exp_avgs, exp_avg_sqs, largest, steps, c, skipped = args
    before = torch.cat(params)
    with pytest.raises(
        RuntimeError, match=r"adamw_step_: exp_avg_sqs\[3\] has shape \[5\], expected \[267144\] as its"
    ):
        torch.ops.dtokd.adamw_step_.default(
            params, grads, exp_avgs, [*exp_avg_sqs[:3], torch.zeros(5)], largest, steps, c, skipped, **kwargs
        )
    with pytest.raises(RuntimeError, match="grads has 7 tensors, expected 4 for each of 2 objectives"):
        torch.ops.dtokd.adamw_step_.default(
            params, grads[:7], exp_avgs, exp_avg_sqs, largest, steps, c, skipped, **kwargs
        )
    assert torch.equal(torch.cat(params), before)
    assert all(step == 1 for step in steps)
