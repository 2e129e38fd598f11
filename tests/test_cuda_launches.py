"""The launches of csrc/cuda, emulated: what no single operation reaches, and how tensors are cut and put into tables.

`test_step.py` and its like run the same kernels through the package's own bindings.
"""

import itertools

import pytest
import torch

from dtokd_kernels import reference
from dtokd_kernels.rules import RULES
from dtokd_kernels.types import Options
from dtokd_kernels.weighting import DTO

from . import cmake, tolerances
from .inputs import FAMILIES, families, gradients
from .test_gram import assert_gram

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="an emulation, for machines without a GPU")

NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
OPTIONS = (True, True, False, 0.0, 1e-8, float("inf"))  # log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit
ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8, "maximize": False}
NEVER = torch.tensor(False)


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    folder = cmake.build(tmp_path_factory.mktemp("launches"), "dtokd_cuda_emulation")
    return cmake.load(folder, "dtokd_cuda_emulation")


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def described(position, role=0):
    """The K gradients of one tensor, None for an absent one, as the launches take them."""
    like = next(g for g in position if g is not None)
    return NAMES[like.dtype], role, like.numel(), [address(g) for g in position]


def positions(grads, roles=None):
    roles = itertools.repeat(0) if roles is None else roles
    return [described(p, role) for p, role in zip(zip(*grads, strict=True), roles, strict=False)]


def gram(launches, grads, roles=None):
    K = len(grads)
    out = torch.empty(3, K, K, dtype=torch.float64)
    launches.gram(positions(grads, roles), K, address(out))
    return out


def gram_balance(launches, grads, roles, losses, options=OPTIONS):
    """(Gram matrices [3, K, K], values, flags)."""
    K = len(grads)
    grams = torch.empty(3, K, K, dtype=torch.float64)
    values, flags = torch.empty(launches.values_size(K), dtype=torch.float64), torch.empty(2, dtype=torch.bool)
    launches.gram_balance(positions(grads, roles), K, address(losses), options, *map(address, (grams, values, flags)))
    return grams, values, flags


# ---- The planner


@pytest.mark.parametrize("roles", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        [0, 0],
        [1],
        [0, 5, 0, 4096, 4097, 0, 12289, 0],
        [n % 50 for n in range(3000)],
        [10**6] * 100,
        [3 * 2**31 + 7, 0, 1],
    ],
    ids=["empty", "one", "mixed", "several tables", "many chunks", "more than 2^31"],
)
def test_every_element_is_in_one_chunk_and_every_chunk_has_its_slot(launches, sizes, roles):
    chunk, slots, tables = launches.plan(sizes, roles)
    assert chunk % launches.TILE == 0
    chunks = [c for table in tables for c in table]
    assert sorted(slot for _, slot, _, _ in chunks) == list(range(slots[-1]))
    for tensor, size in enumerate(sizes):
        own = [c for c in chunks if c[0] == tensor]
        ends = [0, *(end for _, _, _, end in own)]
        assert [begin for _, _, begin, _ in own] == ends[:-1]
        assert ends[-1] == size
        assert all(0 < end - begin <= chunk for _, _, begin, end in own)
        role = tensor % 3 if roles else 0
        assert all(slots[role] <= slot < slots[role + 1] for _, slot, _, _ in own)


def test_the_number_of_chunks_is_bounded(launches):
    """The last block of a Gram launch adds up all chunks, so a large model has larger ones."""
    for sizes in ([10**9], [10**7] * 100, [4096] * 4096):
        _, slots, _ = launches.plan(sizes, False)
        assert slots[-1] <= launches.MAX_WHOLE_CHUNKS + len(sizes)


def test_small_tensors_need_few_launches(launches):
    assert len(launches.plan([1000] * 500, False)[2]) == 1


# ---- Statistics


@pytest.mark.parametrize("K", range(1, 9))
def test_roles_and_absent_gradients(launches, K):
    """One Gram matrix for each role; a gradient that is not there counts as zero, beside Inf too."""
    sizes = [4100, 37, 0, 5000, 64]
    roles = [0, 1, 1, 2, 0]
    grads = gradients(K, sizes, torch.float32)
    grads[K - 1][1] = None if K > 1 else grads[0][1]
    grads[0][1][5] = float("inf")
    grads[0][3] = None if K > 1 else grads[0][3]
    grams = gram(launches, grads, roles)
    for role in (0, 2):
        mine = [[g for g, r in zip(row, roles, strict=True) if r == role] for row in grads]
        assert_gram(grams[role], mine)
    assert grams[1, 0, 0] == float("inf")
    if K > 1:
        assert not grams[1, K - 1].any()


@pytest.mark.parametrize("K", [2, 3, 8])
def test_dtypes_share_one_result(launches, K):
    """Several launches, one for each dtype; the last block of all makes the record."""
    rows = [gradients(K, [4099, 17], dtype, seed=i) for i, dtype in enumerate(NAMES)]
    grads = [[g for row in rows for g in row[k]] for k in range(K)]
    losses = torch.logspace(-1, 1, K, dtype=torch.float64)
    grams, values, flags = gram_balance(launches, grads, None, losses)
    assert_gram(grams[0], grads)
    expected = reference.balance(grams, losses, Options(DTO()))
    assert (values[:K] - expected.weights).abs().max() <= 2 * tolerances.weights_bound(grams[0])
    assert flags.tolist() == [bool(expected.vertex), False]


def test_more_tensors_than_a_table_holds(launches):
    grads = gradients(2, [n % 40 for n in range(1800)], torch.bfloat16)
    assert len(launches.plan([n % 40 for n in range(1800)], False)[2]) > 1
    assert_gram(gram(launches, grads)[0], grads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", [0, 1, 2])
def test_a_number_that_is_not_finite_in_any_role_skips(launches, role, bad):
    grads = gradients(2, [50, 60, 70], torch.float32)
    losses = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert not gram_balance(launches, grads, [0, 1, 2], losses)[2][1]
    grads[1][role][7] = bad
    assert gram_balance(launches, grads, [0, 1, 2], losses)[2][1]


@pytest.mark.parametrize("K", [1, 2, 3, 5, 8])
def test_nothing_at_all_is_skipped(launches, K):
    """Empty tensors only: Gram matrices of zeros, written by a launch that has no chunk."""
    grams, _, flags = gram_balance(launches, gradients(K, [0, 0]), None, torch.ones(K, dtype=torch.float64))
    assert not grams.any()
    assert flags[1]


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("K", range(1, 9))
def test_faces_in_parallel_choose_as_the_serial_loop_does(launches, K, clamp):
    for family, seed in itertools.product(FAMILIES, range(3)):
        J = families(K, seed)[family]
        matrix = J @ J.T
        parallel, serial = torch.empty(2, K, dtype=torch.float64)
        launches.min_norm_weights(address(matrix), K, 0, clamp, address(parallel))
        launches.host_min_norm_weights(address(matrix), K, clamp, address(serial))
        assert torch.equal(parallel, serial), family


@pytest.mark.parametrize("K", [2, 3, 5])
def test_same_bits_for_every_schedule_and_alignment(launches, K):
    sizes = [4096, 9000, 33, 1]
    grads = gradients(K, sizes, torch.float32)
    shifted = [[torch.cat([g[:1], g])[1:] for g in row] for row in grads]
    results = [gram(launches, shifted)]
    try:
        for schedule in ("forward", "reverse", "7"):
            launches.set_schedule(schedule)
            results.append(gram(launches, grads))
    finally:
        launches.set_schedule("forward")
    assert all(torch.equal(results[0], other) for other in results[1:])


# ---- Updates

ADAMW_RULE = RULES["adamw"].index


def targets_of(params, grads, states, steps, *, roles=None, of_group=None, masters=None):
    """What launch_update takes. states: exp_avgs, exp_avg_sqs and perhaps max_exp_avg_sqs."""
    count = len(params)
    roles, of_group, masters = roles or [0] * count, of_group or [0] * count, masters or [None] * count
    return [
        (described(position, role), NAMES[m.dtype], address(p), address(master), [address(m), *map(address, more)],
         address(step), group)
        for position, role, p, master, m, step, group, *more in zip(
            zip(*grads, strict=True), roles, params, masters, states[0], steps, of_group, *states[1:], strict=True
        )
    ]  # fmt: skip


def adamw(launches, params, grads, states, steps, groups, coefficients, skipped=NEVER, **more):
    targets = targets_of(params, grads, states, steps, **more)
    launches.update(ADAMW_RULE, targets, groups, len(grads), address(coefficients), address(skipped))


def fresh(sizes, dtype, K, seed=0):
    """(params, grads, [exp_avgs, exp_avg_sqs], steps)."""
    rows = gradients(K + 3, sizes, dtype, seed)
    states = [rows[K + 1], [s.square() for s in rows[K + 2]]]
    return rows[K], rows[:K], states, [torch.tensor(float(t)) for t in range(len(sizes))]


def clones(tensors):
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("K", [2, 3, 6])
def test_many_groups_and_roles_in_one_call(launches, K):
    """Each tensor with its own group's numbers, role's coefficients and step; 40 groups are more than one launch's.

    Coefficients of both signs, as affine weights have.
    """
    sizes = [(37 * n) % 101 + 1 for n in range(80)] + [5000]
    params, grads, states, steps = fresh(sizes, torch.float32, K)
    groups = [ADAMW | {"lr": 1e-3 * (g + 1), "weight_decay": 0.01 * g, "maximize": g % 2 == 1} for g in range(40)]
    of_group = [t % 40 for t in range(81)]
    roles = [t % 3 for t in range(81)]
    table = (1 + torch.arange(3.0 * K, dtype=torch.float64).view(3, K)) * torch.tensor([-1.0, 1.0]).repeat(K)[:K]
    expected = [clones(params), *map(clones, states), clones(steps)]
    for t in range(81):
        held = {"exp_avg": expected[1][t], "exp_avg_sq": expected[2][t], "step": expected[3][t]}
        numbers = {"amsgrad": False, **groups[of_group[t]]}
        reference.update("adamw", expected[0][t], [row[t] for row in grads], held, table[roles[t]], NEVER, numbers)
    old = {"param": clones(params), "exp_avg": clones(states[0]), "exp_avg_sq": clones(states[1])}
    adamw(launches, params, grads, states, steps, groups, table, roles=roles, of_group=of_group)
    for t in range(81):
        group = groups[of_group[t]]
        sign = -1 if group["maximize"] else 1
        numbers = {name: group[name] for name in ("lr", "beta1", "beta2", "weight_decay", "eps")}
        bounds = tolerances.adamw_bounds(
            {name: values[t] for name, values in old.items()}, [row[t] for row in grads], sign * table[roles[t]],
            t + 1, torch.float32, **numbers,
        )  # fmt: skip
        actual = {"param": params, "exp_avg": states[0], "exp_avg_sq": states[1]}
        for (name, values), truth in zip(actual.items(), expected, strict=False):
            # the reference errs as much in float32
            assert ((values[t] - truth[t]).abs() <= 2 * bounds[name]).all(), (name, t)
    assert steps == expected[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_copies(launches, dtype):
    """The master copy takes the step that a float32 parameter would, and the parameter is its rounding."""
    params, grads, _, steps = fresh([5000, 13], torch.float32, 2)
    halves = [[g.to(dtype) for g in row] for row in grads]
    wide = [[g.float() for g in row] for row in halves]
    _, _, states, _ = fresh([5000, 13], torch.float32, 2, seed=1)
    coefficients = torch.tensor([[0.3, 0.7]] * 3, dtype=torch.float64)
    masters, rounded, again = clones(params), [p.to(dtype) for p in params], [clones(s) for s in states]
    adamw(launches, rounded, halves, again, clones(steps), [ADAMW], coefficients, masters=masters)
    adamw(launches, params, wide, states, steps, [ADAMW], coefficients)
    for t in range(2):
        assert torch.equal(masters[t], params[t])
        assert torch.equal(rounded[t], params[t].to(dtype))
        assert all(torch.equal(a[t], b[t]) for a, b in zip(again, states, strict=True))


def test_bfloat16_state_of_float32_parameters(launches):
    params, grads, states, steps = fresh([5000, 13], torch.float32, 2)
    small = [[s.bfloat16() for s in row] for row in states]
    states = [[s.float() for s in row] for row in small]
    coefficients = torch.tensor([[0.3, 0.7]] * 3, dtype=torch.float64)
    others = clones(params)
    adamw(launches, others, grads, small, clones(steps), [ADAMW], coefficients)
    adamw(launches, params, grads, states, steps, [ADAMW], coefficients)
    for t in range(2):
        assert torch.equal(others[t], params[t])
        assert all(torch.equal(a[t], b[t].bfloat16()) for a, b in zip(small, states, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lr_on_the_device(launches, dtype):
    params, grads, states, steps = fresh([50], torch.float64, 2)
    others, again = clones(params), [clones(s) for s in states]
    lr = torch.tensor(0.25, dtype=dtype)
    coefficients = torch.ones(3, 2, dtype=torch.float64)
    adamw(launches, params, grads, states, clones(steps), [ADAMW | {"lr": 0.25}], coefficients)
    on_device = ADAMW | {"lr": (NAMES[dtype], address(lr))}
    adamw(launches, others, grads, again, steps, [on_device], coefficients)
    assert torch.equal(params[0], others[0])


@pytest.mark.parametrize("K", [2, 4, 8])
def test_a_gradient_of_coefficient_zero_is_not_read(launches, K):
    """At a vertex of the simplex: the addresses of the others lead nowhere."""
    params, grads, states, steps = fresh([5000], torch.float32, K)
    others, again = clones(params), [clones(s) for s in states]
    coefficients = torch.zeros(3, K, dtype=torch.float64)
    coefficients[:, 1] = 0.5
    adamw(launches, params, [grads[1]], states, clones(steps), [ADAMW], coefficients[:, 1:2].contiguous())
    position = ("float32", 0, 5000, [grads[1][0].data_ptr() if k == 1 else 16 for k in range(K)])
    state = [address(s[0]) for s in again]
    target = (position, "float32", address(others[0]), 0, state, address(steps[0]), 0)
    launches.update(ADAMW_RULE, [target], [ADAMW], K, address(coefficients), address(NEVER))
    assert torch.equal(params[0], others[0])


def test_skipped_changes_no_bit(launches):
    params, grads, states, steps = fresh([5000, 0, 7], torch.float32, 2)
    before = [clones(x) for x in (params, *states, steps)]
    adamw(launches, params, grads, states, steps, [ADAMW], torch.ones(3, 2, dtype=torch.float64), torch.tensor(True))
    for a, b in zip(before, (params, *states, steps), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_types_that_do_not_go_together_are_refused(launches):
    params, grads, states, steps = fresh([5], torch.float64, 2)
    states = [[s.float() for s in row] for row in states]
    with pytest.raises(ValueError, match="invalid value"):
        adamw(launches, params, grads, states, steps, [ADAMW], torch.ones(3, 2, dtype=torch.float64))


# ---- Updates that measure


SGD = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "nesterov": True, "first": False}
SGD["maximize"] = False


def measured_and_not(
    launches, sizes, dtype, K, *, rule="adamw", state_dtype=None, amsgrad=False, masters=False, change=lambda _: None,
    skipped=NEVER
):  # fmt: skip
    """An update and its Gram matrices from two launches and from one: what each leaves."""
    roles, of_group = [t % 3 for t in range(len(sizes))], [t % 20 for t in range(len(sizes))]
    numbers = ADAMW if rule == "adamw" else SGD
    groups = [numbers | {"lr": 1e-3 * (g + 1), "maximize": g % 2 == 1} for g in range(20)]
    table = torch.linspace(-1, 1, 3 * K, dtype=torch.float64).view(3, K)
    table[1, 0] = 0
    results = []
    for measured in (False, True):
        params, grads, states, steps = fresh(sizes, dtype, K)
        change(grads)
        if amsgrad:
            states.append([2 * s for s in states[1]])
        states = [[s.to(state_dtype or dtype) for s in row] for row in states]
        copies = [p.float() for p in params] if masters else None
        states = states if rule == "adamw" else states[:1]
        targets = targets_of(params, grads, states, steps, roles=roles, of_group=of_group, masters=copies)
        arguments = targets, groups, K, address(table), address(skipped)
        if measured:
            grams = torch.empty(3, K, K, dtype=torch.float64)
            launches.gram_update(RULES[rule].index, *arguments, address(grams))
        else:
            grams = gram(launches, grads, roles)
            launches.update(RULES[rule].index, *arguments)
        results.append([grams, *params, *(s for row in states for s in row), *steps, *(copies or [])])
    return results


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(d, d) for d in NAMES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
def test_update_that_measures_has_the_bits_of_two_launches(launches, dtype, state_dtype, rule):
    """In several launches, for 20 groups; ragged tensors and whole tiles."""
    sizes = [4096, 0, 5000, 1, *[(37 * n) % 101 + 1 for n in range(30)], 3 * 4096 + 4095]
    for K in (1, 2, 3, 4, 8):
        assert_same_bits(*measured_and_not(launches, sizes, dtype, K, rule=rule, state_dtype=state_dtype), True)


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_update_that_measures_beside_an_absent_gradient(launches, rule, bad):
    """A product with a gradient that is not there is 0, beside Inf too, which is when a step is skipped."""

    def change(grads):
        for t in (0, 1, 2):  # whole tiles and ragged; each role
            grads[0][t][5] = bad
            grads[1][t] = None

    two, one = measured_and_not(
        launches, [3 * 4096, 77, 9000], torch.float32, 3, rule=rule, change=change, skipped=torch.tensor(True)
    )
    assert_same_bits(two[1:], one[1:], True)
    for grams in (two[0], one[0]):
        assert not grams[:, 1].any()
        assert not grams[:, :, 1].any()
        assert not grams[:, 0, 0].isfinite().any()
    assert torch.equal(two[0].nan_to_num(7.0), one[0].nan_to_num(7.0))


def test_update_that_measures_many_tensors(launches):
    """More than a table holds."""
    assert_same_bits(*measured_and_not(launches, [n % 40 for n in range(700)], torch.float32, 2), True)


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_update_that_measures_nothing(launches, rule):
    """Empty tensors only, of two launches: matrices of zeros, and their steps are counted."""
    assert_same_bits(*measured_and_not(launches, [0] * 20, torch.float32, 2, rule=rule), True)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_update_that_measures_beside_master_copies(launches, amsgrad):
    results = measured_and_not(
        launches, [4100, 9], torch.bfloat16, 3, state_dtype=torch.float32, amsgrad=amsgrad, masters=True
    )
    assert_same_bits(*results, True)


def test_update_that_measures_beside_bfloat16_state(launches):
    """A thread takes two words of gradients at a time: its sums have another order, the update the same bits."""
    two, one = measured_and_not(launches, [9000, 3], torch.float32, 2, state_dtype=torch.bfloat16)
    assert_same_bits(two[1:], one[1:], True)
    assert (two[0] - one[0]).abs().max() <= tolerances.REORDERED * two[0].max()


# ---- Both in one launch


def step_both_ways(
    launches, sizes, dtype, state_dtype, K, *, blocks, shared_bytes=1 << 16, change=lambda *_: None, options=OPTIONS
):
    """One step in two launches and in one, from the same tensors: (what each has left, whether the one ran)."""
    roles = [t % 3 for t in range(len(sizes))]
    of_group = [t % 2 for t in range(len(sizes))]
    groups = [ADAMW, ADAMW | {"lr": 0.3, "maximize": True}]
    losses = torch.logspace(0, 1, K, dtype=torch.float64)
    results = []
    for resident in (False, True):
        params, grads, states, steps = fresh(sizes, dtype, K)
        states = [[s.to(state_dtype) for s in row] for row in states]
        change(params, grads, states)
        targets = targets_of(params, grads, states, steps, roles=roles, of_group=of_group)
        done = True
        if resident:
            grams = torch.empty(3, K, K, dtype=torch.float64)
            values, flags = torch.empty(launches.values_size(K), dtype=torch.float64), torch.empty(2, dtype=torch.bool)
            addresses = [address(losses), options, address(grams), address(values), address(flags)]
            done = launches.resident_adamw(targets, groups, K, *addresses, blocks, shared_bytes)
        else:
            grams, values, flags = gram_balance(launches, grads, roles, losses, options)
            launches.update(ADAMW_RULE, targets, groups, K, address(values[K:]), address(flags[1:]))
        results.append([grams, values, flags, *params, *states[0], *states[1], *steps])
    return *results, done


def assert_same_bits(two, one, done):
    assert done
    for a, b in zip(two, one, strict=True):
        assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


RESIDENT_TYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


@pytest.mark.parametrize("blocks", [1, 3, 64])
@pytest.mark.parametrize(("dtype", "state_dtype"), RESIDENT_TYPES)
def test_resident_step_has_the_bits_of_two_launches(launches, dtype, state_dtype, blocks):
    """Tiles kept in registers and in shared memory, read again, and ragged ones; one block may own all or none."""
    sizes = [5 * 4096, 77, 0, 4096, 2 * 4096 + 5, 4 * 4096 + 4095, 1]
    assert_same_bits(*step_both_ways(launches, sizes, dtype, state_dtype, 2, blocks=blocks, shared_bytes=1 << 16))


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("shared_bytes", [1 << 15, 200 << 10])
def test_resident_step_with_any_shared_memory(launches, shared_bytes, K):
    sizes = [9 * 4096 + 10]
    assert_same_bits(
        *step_both_ways(launches, sizes, torch.float32, torch.float32, K, blocks=1, shared_bytes=shared_bytes)
    )


@pytest.mark.parametrize("schedule", ["reverse", "1", "2"])
def test_resident_step_under_any_schedule(launches, schedule):
    launches.set_schedule(schedule)
    try:
        two, one, done = step_both_ways(launches, [6 * 4096 + 5, 9], torch.float32, torch.float32, 2, blocks=3)
    finally:
        launches.set_schedule("forward")
    assert_same_bits(two, one, done)


def test_resident_step_of_misaligned_and_absent_gradients(launches):
    def change(params, grads, _):
        grads[0][0] = torch.cat([grads[0][0][:1], grads[0][0]])[1:]
        grads[1][1] = None
        params[2] = torch.cat([params[2][:1], params[2]])[1:]

    sizes = [3 * 4096, 4096 + 1, 4096, 5000]
    assert_same_bits(*step_both_ways(launches, sizes, torch.float32, torch.float32, 2, blocks=2, change=change))


def test_resident_step_that_is_skipped(launches):
    def spoil(_, grads, __):
        grads[0][1][3] = float("nan")

    two, one, done = step_both_ways(launches, [4096, 50], torch.float32, torch.float32, 2, blocks=2, change=spoil)
    assert one[2][1]
    assert done
    for a, b in zip(two[2:], one[2:], strict=True):
        assert torch.equal(a, b)


def test_resident_step_of_negative_coefficients(launches):
    """Affine weights of parallel gradients of unequal lengths; the numbers themselves are those of `gram_balance`."""

    def change(_, grads, __):
        grads[1] = [3 * a + 0.1 * b for a, b in zip(*grads, strict=True)]

    affine = (OPTIONS[0], False, *OPTIONS[2:])
    sizes = [2 * 4096 + 9, 0, 0, 33]
    two, one, done = step_both_ways(
        launches, sizes, torch.float32, torch.float32, 2, blocks=2, change=change, options=affine
    )
    assert one[1][2:4].min() < 0 < one[1][2:4].max()
    assert_same_bits(two, one, done)


def test_resident_step_of_as_many_tensors_as_a_table_holds(launches):
    """And of more: one launch would take only those of the first table, and leaves all as they were."""
    f32 = torch.float32
    assert_same_bits(*step_both_ways(launches, [7] * 390, f32, f32, 2, blocks=60))
    _, one, done = step_both_ways(launches, [7] * 800, f32, f32, 2, blocks=60)
    assert not done
    params, _, states, steps = fresh([7] * 800, f32, 2)
    assert all(torch.equal(a, b) for a, b in zip(one[3:], [*params, *states[0], *states[1], *steps], strict=True))


def test_resident_step_refuses_what_does_not_fit(launches):
    """And leaves everything as it was."""
    f32 = torch.float32
    for sizes, dtype, K, blocks, shared_bytes in (
        ([4096 * 30], f32, 2, 1, 1 << 16),
        ([50], torch.float64, 2, 1, 1 << 16),
        ([50], f32, 3, 1, 1 << 16),
        ([50], f32, 2, 0, 1 << 16),
        ([50], f32, 2, 1, 0),
    ):
        _, one, done = step_both_ways(launches, sizes, dtype, dtype, K, blocks=blocks, shared_bytes=shared_bytes)
        assert not done
        params, _, states, steps = fresh(sizes, dtype, K)
        untouched = [*params, *states[0], *states[1], *steps]
        assert all(torch.equal(a, b) for a, b in zip(one[3:], untouched, strict=True))
