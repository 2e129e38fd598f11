"""One step of AdamW and SGD on a combined gradient, each implementation against the reference in float64.

Inputs are rounded to the type first, so that the float64 run starts from the same numbers; tolerances.py derives how
far the results may lie apart, element by element.
"""

from dataclasses import replace

import pytest
import torch

from dtokd_kernels import backends
from dtokd_kernels.types import Role

from . import tolerances
from .device import DEVICE
from .inputs import CHUNK, IMAGE, LAYOUTS, SIZES, each_dtype, gradients
from .test_gram import assert_gram
from .updates import Update, measure_and_run, run

COEFFICIENTS = torch.tensor([0.6, 0.4, 1.7, 3e-3, -0.5, 12.0, 1 / 3, 0.1], dtype=torch.float64)
NEVER = torch.tensor(False)

ADAMW = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.1,
    "eps": 1e-8,
    "amsgrad": False,
    "maximize": False,
}
SGD = {
    "lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False,
    "first": False,
}  # fmt: skip
VARIANTS = {
    "adamw": ADAMW,
    "adamw amsgrad": ADAMW | {"amsgrad": True},
    "adamw maximize": ADAMW | {"maximize": True},
    "adamw amsgrad maximize": ADAMW | {"amsgrad": True, "maximize": True},
    "adamw no decay": ADAMW | {"weight_decay": 0.0},
    "adamw beta1 0": ADAMW | {"beta1": 0.0},
    "adamw beta1 0.3": ADAMW | {"beta1": 0.3, "beta2": 0.5},
    "adamw eps": ADAMW | {"eps": 0.1},
    "sgd": SGD,
    "sgd decay": SGD | {"weight_decay": 0.3},
    "sgd maximize": SGD | {"maximize": True, "weight_decay": 0.3},
    "sgd momentum": SGD | {"momentum": 0.9},
    "sgd first": SGD | {"momentum": 0.9, "dampening": 0.5, "first": True},
    "sgd dampening": SGD | {"momentum": 0.9, "dampening": 0.5},
    "sgd nesterov": SGD | {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "sgd nesterov first": SGD | {"momentum": 0.9, "nesterov": True, "first": True},
    "sgd nesterov maximize": SGD | {"momentum": 0.9, "nesterov": True, "maximize": True, "weight_decay": 0.1},
}


class Step:
    """Tensors of one step and the means to run it: `variant` names the rule and its numbers."""

    def __init__(self, variant, K, shapes, dtype, seed=0, coefficients=None):
        self.rule, self.options = variant.split()[0], VARIANTS[variant]
        self.coefficients = COEFFICIENTS[:K].clone() if coefficients is None else coefficients
        rows = gradients(K + 2, shapes, dtype, seed)
        names = ["param", "exp_avg"] if self.rule == "adamw" else ["param"]
        if self.rule == "sgd" and self.options["momentum"] != 0:
            names = ["param", "momentum_buffer"]
        self.tensors = dict(zip(names, rows[K:], strict=False))
        if self.rule == "adamw":
            squares = gradients(2, shapes, torch.float64, seed + 1)
            self.tensors["exp_avg_sq"] = [s.square().to(dtype) for s in squares[0]]
            if self.options["amsgrad"]:
                self.tensors["max_exp_avg_sq"] = [s.square().to(dtype) for s in squares[1]]
        self.grads = rows[:K]
        # each tensor has taken steps of its own; the first of them none
        self.steps = [torch.tensor(float(7 * t)) for t in range(len(shapes))]

    def clone(self, convert=torch.clone):
        """A copy; `convert` may change what the gradient-sized tensors are."""
        other = object.__new__(Step)
        other.rule, other.options, other.coefficients = self.rule, self.options, self.coefficients.clone()
        other.grads = [[convert(g) for g in row] for row in self.grads]
        other.tensors = {name: [convert(t) for t in values] for name, values in self.tensors.items()}
        other.steps = [t.clone() for t in self.steps]
        return other

    def run(self, implementation, skipped=NEVER):
        run(implementation, [self.update()], self.coefficients.expand(3, -1), skipped)
        return self

    def update(self):
        names = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"] if self.rule == "adamw" else ["momentum_buffer"]
        state = {name: self.tensors[name] for name in names if name in self.tensors}
        if self.rule == "adamw":
            state["step"] = self.steps
        reach = tuple(range(len(self.grads)))
        return Update(self.rule, Role.SHARED, reach, self.tensors["param"], self.grads, state, self.options)

    def bounds(self, t, dtype):
        """|error| of the tensors at position t, of a step from the state that is now."""
        old = {name: values[t] for name, values in self.tensors.items()}
        grads = [row[t] for row in self.grads]
        if self.rule == "sgd":
            return tolerances.sgd_bounds(old, grads, self.coefficients, dtype, **self.options)
        numbers = {name: self.options[name] for name in ("lr", "beta1", "beta2", "weight_decay", "eps")}
        sign = -1 if self.options["maximize"] else 1
        return tolerances.adamw_bounds(old, grads, sign * self.coefficients, int(self.steps[t]) + 1, dtype, **numbers)


def implementation():
    """What the `backend` fixture chose."""
    return backends.select(DEVICE)


def assert_step(before, after):
    """`after` is `before` after one step, as far as rounding allows."""
    truth = before.clone(lambda t: t.to(torch.float64, copy=True)).run(backends.REFERENCE)
    dtype = before.grads[0][0].dtype
    for t in range(len(before.steps)):
        bounds = before.bounds(t, dtype)
        assert bounds.keys() == after.tensors.keys()
        for name, bound in bounds.items():
            actual = after.tensors[name][t]
            assert actual.dtype == dtype
            error = (actual.double() - truth.tensors[name][t]).abs()
            assert bound.isfinite().all()
            assert (error <= bound).all(), f"{name}[{t}]: {(error / bound).max()} times the bound"
    if before.rule == "adamw":
        assert after.steps == [s + 1 for s in before.steps]


@each_dtype
@pytest.mark.parametrize("K", range(1, 9))
@pytest.mark.parametrize("variant", ["adamw", "adamw amsgrad", "sgd", "sgd momentum"])
def test_every_number_of_objectives_and_size(backend, variant, K, dtype):
    before = Step(variant, K, SIZES, dtype)
    assert_step(before, before.clone().run(implementation()))


@each_dtype
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(backend, variant, dtype):
    before = Step(variant, 2, [33, (0,), (5, 7), (), 1023], dtype)
    assert_step(before, before.clone().run(implementation()))


@each_dtype
@pytest.mark.parametrize("coefficients", [[0.0, 1.5], [1.5, 0.0], [0.0, 0.0], [-1.0, 1.0]], ids=str)
@pytest.mark.parametrize("variant", ["adamw", "adamw maximize", "sgd nesterov"])
def test_vertex_coefficients(backend, variant, coefficients, dtype):
    before = Step(variant, 2, [40], dtype, coefficients=torch.tensor(coefficients, dtype=torch.float64))
    assert_step(before, before.clone().run(implementation()))


#: A whole chunk of Triton's kernels and tiles of CUDA's, which take 16-byte accesses, with elements left over.
WHOLE = [8192 + 77, 5]


def measured(step, skipped=NEVER, **changes):
    """Run a step that measures; its Gram matrices [3, K, K]."""
    K = len(step.grads)
    table = changes.pop("table", step.coefficients.expand(3, K))
    return measure_and_run(implementation(), [replace(step.update(), **changes)], table, skipped)


@pytest.mark.parametrize("K", [1, 2, 3, 8])
@pytest.mark.parametrize("variant", ["adamw", "sgd momentum"])
def test_coefficients_of_both_signs(backend, variant, K):
    """As affine weights have: a gradient of a negative coefficient counts like any other, measured or not."""
    coefficients = COEFFICIENTS[:K] * torch.tensor([-1.0, 1.0]).repeat(4)[:K]
    before = Step(variant, K, WHOLE, torch.float32, coefficients=coefficients)
    assert_step(before, before.clone().run(implementation()))
    after = before.clone()
    assert_gram(measured(after)[Role.SHARED], before.grads)
    assert_step(before, after)


@pytest.mark.parametrize("reach", [(0,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("variant", ["adamw", "sgd momentum"])
def test_partial_reach(backend, variant, reach):
    """Some objectives' coefficients of a role; products with the other objectives are 0, beside Inf too."""
    table = torch.stack([COEFFICIENTS[:3], -COEFFICIENTS[3:6], COEFFICIENTS[5:8]])
    before = Step(variant, len(reach), WHOLE, torch.float32, coefficients=table[Role.PRIVATE][list(reach)])
    after = before.clone()
    grams = measured(after, table=table, reach=reach, role=Role.PRIVATE)
    assert_step(before, after)
    assert_gram(grams[Role.PRIVATE][list(reach)][:, list(reach)], before.grads)
    before.grads[0][0][3] = before.grads[0][1][3] = float("inf")  # such a step is skipped
    bad = measured(before, torch.tensor(True), table=table, reach=reach, role=Role.PRIVATE)
    there = torch.tensor([[i in reach and j in reach for j in range(3)] for i in range(3)])
    for matrices in (grams, bad):
        assert (matrices[Role.PRIVATE][~there] == 0).all()
        assert not matrices[Role.SHARED].any()
        assert not matrices[Role.PLAIN].any()
    assert not bad[Role.PRIVATE][reach[0], reach[0]].isfinite()


@pytest.mark.parametrize("variant", ["adamw", "sgd momentum"])
def test_more_tensors_than_a_launch_takes(backend, variant):
    """The bits of one long tensor that has the elements of all, in each of several launches.

    Most are empty: they take places too, and no time of an interpreter.
    """
    many = Step(variant, 2, [(37 * n) % 40 if n % 60 < 2 else 0 for n in range(900)], torch.float32)
    many.steps = [torch.tensor(3.0) for _ in many.steps]
    one = many.clone()
    one.grads = [[torch.cat(row)] for row in one.grads]
    one.tensors = {name: [torch.cat(values)] for name, values in one.tensors.items()}
    one.steps = one.steps[:1]
    again = many.clone()
    for step in (many, one):
        step.run(implementation())
    assert_gram(measured(again)[Role.SHARED], again.grads)
    for step in (many, again):
        assert all(torch.equal(torch.cat(step.tensors[name]), one.tensors[name][0]) for name in one.tensors)
        if variant == "adamw":
            assert step.steps == [4.0] * 900


@pytest.mark.parametrize("what", ["param", "state", "grads"])
@pytest.mark.parametrize("variant", ["adamw amsgrad", "sgd nesterov"])
def test_whole_chunks_at_any_address(backend, variant, what):
    """One list of each at addresses that are no multiples of 16 bytes."""
    before = Step(variant, 2, WHOLE, torch.float32)
    for measure in (False, True):
        after = before.clone()
        if what == "grads":
            after.grads[1] = [LAYOUTS["misaligned"](g) for g in after.grads[1]]
        else:
            name = [name for name in after.tensors if (name == "param") == (what == "param")][-1]
            after.tensors[name] = [LAYOUTS["misaligned"](t) for t in after.tensors[name]]
        if measure:
            assert_gram(measured(after)[Role.SHARED], before.grads)
        else:
            after.run(implementation())
        assert_step(before, after)


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_gradients_cancel(backend, variant):
    """Two equal gradients at opposite coefficients: what is left is rounding, and no more than the bounds say."""
    before = Step(variant, 2, [100], torch.float32, coefficients=torch.tensor([0.3, -0.3], dtype=torch.float64))
    before.grads[1] = [g.clone() for g in before.grads[0]]
    assert_step(before, before.clone().run(implementation()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["adamw amsgrad", "sgd nesterov"])
def test_layout_of_everything(backend, variant, layout):
    before = Step(variant, 3, [IMAGE, IMAGE], torch.float32)
    after = before.clone(LAYOUTS[layout])
    strides = [p.stride() for p in after.tensors["param"]]
    assert_step(before, after.run(implementation()))
    assert strides == [p.stride() for p in after.tensors["param"]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["param", "state", "grads"])
@pytest.mark.parametrize("variant", ["adamw amsgrad", "sgd nesterov"])
def test_layout_of_one_thing(backend, variant, what, layout):
    before = Step(variant, 2, [IMAGE], torch.float32)
    after = before.clone()
    if what == "grads":
        after.grads[1] = [LAYOUTS[layout](g) for g in after.grads[1]]
    else:
        for name in after.tensors:
            if (name == "param") == (what == "param"):
                after.tensors[name] = [LAYOUTS[layout](t) for t in after.tensors[name]]
    assert_step(before, after.run(implementation()))


@pytest.mark.parametrize("variant", ["adamw amsgrad", "sgd nesterov"])
def test_state_of_another_dtype(backend, variant):
    """bfloat16 parameters with float32 state, as some checkpoints have: computed in float32, each stored as it is."""
    before = Step(variant, 2, [100], torch.bfloat16)
    after = before.clone()
    for name in after.tensors:
        if name != "param":
            after.tensors[name] = [t.float() for t in after.tensors[name]]
    after.run(implementation())
    assert {t[0].dtype for name, t in after.tensors.items() if name != "param"} == {torch.float32}
    for name in after.tensors:
        after.tensors[name] = [t.bfloat16() for t in after.tensors[name]]
    assert_step(before, after)


@each_dtype
@pytest.mark.parametrize("variant", VARIANTS)
def test_skipped_step_changes_no_bit(backend, variant, dtype):
    before = Step(variant, 2, [33, 65], dtype)
    before.grads[0][0][5] = float("nan")
    after = before.clone().run(implementation(), skipped=torch.tensor(True))
    for name in before.tensors:
        assert all(torch.equal(a, b) for a, b in zip(before.tensors[name], after.tensors[name], strict=True))
    assert after.steps == before.steps


@each_dtype
@pytest.mark.parametrize("variant", ["adamw amsgrad", "sgd nesterov"])
def test_same_bits_for_any_number_of_threads(backend, variant, dtype):
    before = Step(variant, 3, [2 * CHUNK + 5, 33, CHUNK], dtype)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(before.clone().run(implementation()))
    for name in before.tensors:
        pairs = zip(results[0].tensors[name], results[1].tensors[name], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_leaves_gradients_and_coefficients_alone(backend, variant):
    before = Step(variant, 2, [IMAGE], torch.float32)
    after = before.clone().run(implementation())
    assert torch.equal(before.coefficients, after.coefficients)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(before.grads, after.grads, strict=True))


@pytest.mark.parametrize("variant", ["adamw amsgrad", "sgd nesterov"])
def test_writing_shows_in_versions(backend, variant):
    """Autograd finds out by its version that a parameter which it saved for a backward pass has changed since."""
    step = Step(variant, 2, [33], torch.float32)
    versions = {name: t[0]._version for name, t in step.tensors.items()}
    step.run(implementation())
    assert all(step.tensors[name][0]._version > version for name, version in versions.items())


@pytest.mark.parametrize("variant", ["adamw", "sgd momentum"])
def test_tensor_lr(backend, variant):
    before = Step(variant, 2, [33], torch.float64)
    after = before.clone()
    after.options = after.options | {"lr": torch.tensor(after.options["lr"], dtype=torch.float64)}
    assert_step(before, after.run(implementation()))


@pytest.mark.parametrize("variant", ["adamw", "sgd momentum"])
def test_tiny_gradients(backend, variant):
    """Squares of 1e-20 underflow in float32: eps decides then, nothing divides by zero."""
    before = Step(variant, 2, [100], torch.float32)
    before.grads = [[g * 1e-20 for g in row] for row in before.grads]
    for name in before.tensors:
        if name != "param":
            before.tensors[name] = [torch.zeros_like(t) for t in before.tensors[name]]
    after = before.clone().run(implementation())
    assert after.tensors["param"][0].isfinite().all()
    assert_step(before, after)
