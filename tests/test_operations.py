"""The operations as torch sees them: one schema for the CPU, CUDA and Triton; fake kernels, and what is refused.

The library of the CPU, that of CUDA by its emulation on CPU tensors, and Triton's kernels in its interpreter (in a
process of its own, see test_triton.py).
"""

import gc
import re
from pathlib import Path

import pytest
import torch

from dtokd_kernels import backends, operations
from dtokd_kernels.implementations import TICKETS
from dtokd_kernels.rules import RULES, STEP_SLOT

from . import emulated
from .device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the operations of CPU tensors are tested")
SIZES = (3, 0, 17, 8201)
LIBRARIES = ["dtokd_triton"] if backends.interpreted() else ["dtokd", "dtokd_emulated"]


@pytest.fixture(params=LIBRARIES)
def ops(request):
    if request.param == "dtokd" and backends.missing("cpu"):
        pytest.skip(backends.missing("cpu"))
    if request.param == "dtokd_triton":
        backends.select(torch.device("cpu"), "triton")
    if request.param == "dtokd_emulated":
        with emulated.emulated_cuda(request.getfixturevalue("emulated_library")):
            yield torch.ops.dtokd_emulated
        return
    yield getattr(torch.ops, request.param)


def tensors(seed, sizes=SIZES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=generator) for n in sizes]


def rows(*lists):
    """Of lists of tensors, one for each objective, row by row."""
    return [g for column in zip(*lists, strict=True) for g in column]


T = len(SIZES)
SHAPE = [3] * T, [0, 0, 1, 2]  # reach, role
OPTIONS = True, True, False, 1.0, 1e-8, 2.0**60
NUMBERS = {
    "adamw": [0.1, 0.9, 0.99, 0.1, 1e-8, 0, 0],
    "sgd": [0.1, 0.9, 0, 0.1, 0, 0, 0],
    "lion": [0.1, 0.9, 0.99, 0.1, 0],
}


def tickets():
    return torch.zeros(TICKETS, dtype=torch.int32)


def prepared(rule, seed=2):
    """Arguments of `prepare`: all rows of two groups, with the states that are always there."""
    of_rule = RULES[rule]
    names = [n for n, number in of_rule.states.items() if number in (None, "momentum")]
    lists = [tensors(seed + 1 + i) for i in range(len(names))]
    lists += [[torch.tensor(1.0) for _ in SIZES]] if of_rule.counts_steps else []
    held = [of_rule.slots[n] for n in names] + ([STEP_SLOT] if of_rule.counts_steps else [])
    mask = sum(1 << slot for slot in held)
    return of_rule.index, tensors(seed), rows(*lists), *SHAPE, [0, 0, 1, 1], [mask] * T


def update_arguments(ops, rule, measure=False):
    number = ops.prepare.default(*prepared(rule))
    table, grads = torch.ones(3, 2, dtype=torch.float64), rows(tensors(0), tensors(1))
    return number, grads, table, torch.tensor(False), [], [-1, -1], NUMBERS[rule] * 2, measure, tickets()


def calls(ops):
    grads = rows(tensors(0), tensors(1))
    gram = torch.tensor([[18.0, -22.0], [-22.0, 38.0]], dtype=torch.float64)
    grams, losses = torch.stack([gram, 0 * gram, gram]), torch.tensor([2.0, 0.5], dtype=torch.float64)
    number, _, table, _, *numbers = update_arguments(ops, "adamw")
    return {
        "gram": [(grads, *SHAPE, 2, tickets())],
        "gram_balance": [(grads, *SHAPE, losses, *OPTIONS, tickets())],
        "balance": [
            (grams, losses, None, None, None, 0, *OPTIONS),
            (grams, losses, losses, None, None, 0, *OPTIONS),
            (grams, losses, None, losses + 1, losses, 7, *OPTIONS),
        ],
        "min_norm_weights": [(gram, True, torch.tensor([True, True])), (gram, False, None)],
        "combine_": [(tensors(2), grads, *SHAPE, table)],
        "prepare": [prepared(rule) for rule in RULES],
        "release": [(number, torch.ones(1))],
        "update_": [update_arguments(ops, rule, measure) for rule in RULES for measure in (False, True)],
        "resident_": [(number, grads, losses, *OPTIONS, *numbers[:3], tickets())],
        "instructions": [(torch.ones(1),)],
    }


def test_every_operation_has_a_schema_and_is_checked(ops):
    namespace = ops.name
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{namespace}::")}
    assert names == set(operations.SCHEMAS) == set(calls(ops))


@pytest.mark.parametrize("name", operations.SCHEMAS)
def test_opcheck(ops, name):
    operation = getattr(ops, name).default
    if not operation.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU):
        assert name in ("resident_", "instructions")
        return
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # one returns another number each time, the other a text of any length
    some = {"prepare": utilities[:3], "instructions": utilities[:2]}.get(name, utilities)
    for arguments in calls(ops)[name]:
        torch.library.opcheck(operation, arguments, test_utils=some)


def test_under_torch_compile(ops):
    """A compiled function keeps the operations as calls."""

    def weights(a, b, p):
        out = [torch.empty_like(p)]
        ops.combine_.default(out, [p, 2 * p], [3], [0], torch.ones(3, 2, dtype=torch.float64))
        return ops.min_norm_weights.default(torch.stack([a, b]), True, None), out[0]

    arguments = torch.tensor([18.0, -22.0]).double(), torch.tensor([-22.0, 38.0]).double(), torch.ones(3)
    compiled = torch.compile(weights, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(*arguments), weights(*arguments), strict=True):
        assert torch.equal(got, expected)


REFUSED = (RuntimeError, ValueError)


def test_wrong_gradients_are_refused_before_anything_changes(ops):
    arguments = prepared("adamw")
    params, state = arguments[1], arguments[2]
    number = ops.prepare.default(*arguments)
    before = [t.clone() for t in params + state]
    _, grads, *rest = update_arguments(ops, "adamw")
    with pytest.raises(REFUSED, match=r"update_: grads\[3\] has shape \[5\], expected \[8201\] as its"):
        ops.update_.default(number, [*grads[:7], torch.zeros(5)], *rest)
    with pytest.raises(REFUSED, match="update_: grads has 7 tensors, expected more"):
        ops.update_.default(number, grads[:7], *rest)
    with pytest.raises(REFUSED, match="float64"):
        ops.update_.default(number, grads, rest[0].float(), *rest[1:])
    assert all(torch.equal(a, b) for a, b in zip(before, params + state, strict=True))


def test_wrong_state_is_refused_when_it_is_prepared(ops):
    rule, params, state, *rest = prepared("adamw")
    state[-2] = torch.zeros(5)
    with pytest.raises(REFUSED, match=r"prepare: state\[3\] has shape \[5\], expected \[8201\] as its"):
        ops.prepare.default(rule, params, state, *rest)
    with pytest.raises(REFUSED, match="state has 11 tensors, expected 12"):
        ops.prepare.default(rule, params, state[:-1], *rest)


def test_gradients_laid_out_otherwise_are_copied(ops):
    p, channels_last = torch.rand(2, 3, 4, 5), torch.channels_last
    grads = [torch.rand(2, 3, 4, 5) for _ in range(2)]
    gaps = torch.stack([grads[1], grads[1]], -1)[..., 0]
    for second in (grads[1].contiguous(memory_format=channels_last), gaps, grads[1][:1, :1, :1, :1].expand(p.shape)):
        expected = ops.gram.default([grads[0], second.contiguous()], [3], [0], 2, tickets())
        assert torch.equal(ops.gram.default([grads[0], second], [3], [0], 2, tickets()), expected)
        outs = [[torch.empty_like(p)] for _ in range(2)]
        table = torch.ones(3, 2, dtype=torch.float64)
        for out, g in zip(outs, (second, second.contiguous()), strict=True):
            ops.combine_.default(out, [g, grads[0]], [3], [0], table)
        assert torch.equal(outs[0][0], outs[1][0])


def test_a_step_follows_memory_that_has_moved(ops):
    """A parameter that got other memory since it was prepared is updated there."""
    arguments = prepared("sgd")
    number, (p, *_) = ops.prepare.default(*arguments), arguments[1]
    _, *rest = update_arguments(ops, "sgd")
    old = p.data
    p.data = old.clone()
    moved, before = p.data_ptr(), old.clone()
    ops.update_.default(number, *rest)
    assert p.data_ptr() == moved
    assert torch.equal(old, before)
    assert not torch.equal(p, before)


def test_what_was_prepared_is_kept_until_it_is_released(ops):
    arguments = prepared("sgd")
    number = ops.prepare.default(*arguments)
    _, *rest = update_arguments(ops, "sgd")
    del arguments
    gc.collect()
    ops.update_.default(number, *rest)
    ops.release.default(number, torch.ones(1))
    with pytest.raises((RuntimeError, KeyError)):
        ops.update_.default(number, *rest)


def test_rules_are_those_of_cpp():
    """Names, order and numbers of csrc/include/dtokd/update_rules.h, and how many states each rule has."""
    text = (Path(__file__).parents[1] / "csrc/include/dtokd/update_rules.h").read_text().replace("\\\n", " ")
    listed = re.search(r"#define DTOKD_RULES\(X\)(.*)", text)[1]
    names = re.findall(r"X\((\w+)\)", listed)
    assert [name.lower() for name in names] == list(RULES)
    assert int(re.search(r"kMaxStates = (\d+)", text)[1]) == STEP_SLOT
    for name, rule in zip(names, RULES.values(), strict=True):
        numbers = re.search(rf"#define DTOKD_NUMBERS_{name}\(X\)(.*)", text)[1]
        assert tuple(re.findall(r"X\((\w+)\)", numbers)) == rule.numbers
        formula = text[text.index(f"struct {name} {{") :]
        states, required = re.search(r"kStates = (\d+), kRequired = (\d+)", formula).groups()
        assert int(states) == len(rule.states)
        assert int(required) == sum(number is None for number in rule.states.values())
        assert re.search(r"kCountsSteps = (\w+)", formula)[1] == str(rule.counts_steps).lower()
