"""dk.min_norm_weights: the shortest point of conv{g_1, ..., g_K} (Eq. 9-12), against exact and published solvers."""

import functools
import itertools
from fractions import Fraction

import pytest
import torch
from scipy.optimize import minimize

import dtokd_kernels as dk

from . import tolerances
from .inputs import FAMILIES, families, gram_of

#: Affinely independent gradients: weights are unique, and well enough conditioned to be compared.
GENERIC = ("random", "aligned", "tiny", "huge")
U = 2.0**-53


def direction(J, weights):
    return weights @ J


def kkt_gap(gram, weights):
    """How far some <g_i, d> falls short of ||d||^2: 0 at the min-norm point, and nowhere else."""
    Gw = gram @ weights
    return (weights @ Gw - Gw.min()).item()


def solve_exactly(rows):
    """The smallest ||d||^2 and min-norm weights of K gradients, in rational arithmetic: no rounding at all.

    Faces of the simplex, the smallest first, until one fulfils the condition of the minimum, which only minima do.
    """
    G = exact_gram(rows)
    K = len(G)
    for size in range(1, K + 1):
        for face in itertools.combinations(range(K), size):
            # stationarity on the face: G_face w = lambda 1, sum w = 1
            system = [[G[i][j] for j in face] + [Fraction(-1), Fraction(0)] for i in face]
            system.append([Fraction(1)] * size + [Fraction(0), Fraction(1)])
            solution = _solve_linear(system)
            if solution is None or min(solution[:size]) < 0:
                continue
            value = solution[size]  # lambda = ||d||^2
            if all(sum(G[i][j] * w for j, w in zip(face, solution, strict=False)) >= value for i in range(K)):
                weights = [Fraction(0)] * K
                for i, w in zip(face, solution, strict=False):
                    weights[i] = w
                return value, weights
    raise AssertionError("a convex function has a minimum on the simplex")


def exact_gram(rows):
    rows = [[Fraction(x) for x in row] for row in rows]
    return [[sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]


def _solve_linear(rows):
    """Gauss-Jordan over fractions of [A | b]; None if A is singular."""
    n = len(rows)
    rows = [list(row) for row in rows]
    for i in range(n):
        pivot = next((r for r in range(i, n) if rows[r][i] != 0), None)
        if pivot is None:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for r in range(n):
            if r != i and rows[r][i] != 0:
                rows[r] = [a - rows[r][i] * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [row[-1] for row in rows]


def test_golden(backend):
    weights = dk.min_norm_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, torch.tensor([0.6, 0.4], dtype=torch.float64), rtol=0, atol=4 * U)


def test_one_objective(backend):
    assert dk.min_norm_weights(torch.tensor([[7.0]])).tolist() == [1.0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("K", range(2, 9))
def test_satisfies_the_optimality_condition(backend, K, family):
    for seed in range(3 if K < 7 else 1):
        gram = gram_of(families(K, seed)[family])
        weights = dk.min_norm_weights(gram)
        assert (weights >= 0).all()
        assert abs(weights.sum().item() - 1) <= 2 * K * U
        assert kkt_gap(gram, weights) <= tolerances.kkt_gap_bound(gram)


@pytest.mark.parametrize("K", [2, 3, 4, 5])
def test_equals_rational_arithmetic(backend, K):
    generator = torch.Generator().manual_seed(K)
    for _ in range(40 if K < 5 else 10):
        J = torch.randint(-9, 10, (K, K + 3), generator=generator)
        value, exact = solve_exactly(J.tolist())
        gram = gram_of(J.double())  # integers: exact
        bound = tolerances.weights_bound(gram)
        weights = dk.min_norm_weights(gram)
        assert (weights - torch.tensor([float(w) for w in exact], dtype=torch.float64)).abs().max() <= bound
        assert abs((weights @ gram @ weights).item() - float(value)) <= tolerances.kkt_gap_bound(gram)


def test_affinely_dependent_integers(backend):
    """More gradients than dimensions: weights are not unique, the shortest length is."""
    generator = torch.Generator().manual_seed(1)
    for K, n in [(3, 1), (4, 2), (5, 2), (5, 3)]:
        for _ in range(10):
            J = torch.randint(-5, 6, (K, n), generator=generator)
            value, _ = solve_exactly(J.tolist())
            gram = gram_of(J.double())
            weights = dk.min_norm_weights(gram)
            bound = tolerances.kkt_gap_bound(gram, degenerate=True)
            assert abs((weights @ gram @ weights).item() - float(value)) <= bound


#: Gradients whose lengths differ by up to 1e12, and beside that: what float64's Gram matrix knows them by.
APART = {
    "independent": lambda normal, K, share: normal(K, K + 3),
    "conflicting": lambda normal, K, share: (lambda J: J - (1 - share) * J.mean(0))(normal(K, K + 3)),
    "dependent": lambda normal, K, share: normal(K, K - 1),  # 0 may be a combination
    "opposite": lambda normal, K, share: (lambda J: torch.cat([J, share * normal(1, K + 3) - 2 * J[:1]]))(
        normal(K - 1, K + 3)
    ),
    "nearly parallel": lambda normal, K, share: normal(1, K + 3) + share * normal(K, K + 3),
    "nearly dependent": lambda normal, K, share: (lambda J: torch.cat([J, J.mean(0)[None] + share * normal(1, K + 3)]))(
        normal(K - 1, K + 3)
    ),
}


@functools.cache
def apart(kind, K, seed):
    """Gradients, float64's nearest to their Gram matrix, and the exact ||d||^2 and weights."""
    generator = torch.Generator().manual_seed(100 * K + seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def draw(low, high):
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64)

    J = APART[kind](normal, K, 10 ** draw(-9, -1))
    J = 10 ** (draw(0, 12) * torch.rand(K, generator=generator, dtype=torch.float64))[:, None] * J
    G = exact_gram(J.tolist())
    return J, torch.tensor([[float(x) for x in row] for row in G], dtype=torch.float64), G, *solve_exactly(J.tolist())


def judged(kind, K, seed):
    """What the weights of `apart` come to, in exact arithmetic: ||d||^2, its least value, <g_i, d> / ||g_i||, and s."""
    _, gram, G, least, exact = apart(kind, K, seed)
    weights = [Fraction(w) for w in dk.min_norm_weights(gram).tolist()]
    products = [sum(G[i][j] * weights[j] for j in range(K)) for i in range(K)]
    norms = gram.diagonal().sqrt()
    size = max((torch.tensor([float(w) for w in row]).double() * norms).sum().item() for row in (weights, exact))
    gains = torch.tensor([float(x) for x in products], dtype=torch.float64) / norms
    return float(sum(w * x for w, x in zip(weights, products, strict=True))), float(least), gains, size


@pytest.mark.parametrize("K", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", APART)
def test_lengths_that_are_far_apart(backend, kind, K):
    """The bounds of `reference.min_norm_weights`: d is no longer than float64's Gram knows, and no objective ascends.

    Where gradients are nearly equal, or one is nearly in the affine hull of others, d may be off by sqrt(EQUAL) of the
    parts that it is made of, for each gradient that has been taken for another.
    """
    for seed in range(12 if K < 5 else 3):
        square, least, gains, size = judged(kind, K, seed)
        excess, short = tolerances.EQUAL * size**2, tolerances.EQUAL * size
        if kind in ("opposite", "nearly parallel", "nearly dependent"):
            off = K * (2 * tolerances.EQUAL) ** 0.5 * size
            excess, short = excess + 2 * off * max(least, 0.0) ** 0.5 + off**2, short + off
        assert square <= least * (1 + 4 * U) + excess, seed
        assert (gains >= -short).all(), seed
        if kind == "independent" and least > 1e-6 * size**2:
            assert square**0.5 <= (1 + 1e-6) * least**0.5, seed


@pytest.mark.parametrize("K", [3, 5, 8])
@pytest.mark.parametrize("kind", ["independent", "conflicting"])
def test_permutation_of_lengths_that_are_far_apart(backend, kind, K):
    """Weights, in units of 1 / ||g_i||, go along as far as the unit gradients' matrix is conditioned."""
    for seed in range(6):
        J, gram, *_ = apart(kind, K, seed if K < 5 else seed % 3)
        norms = gram.diagonal().sqrt()
        weights = dk.min_norm_weights(gram)
        size = (weights * norms).sum()
        smallest = torch.linalg.eigvalsh(gram / norms[:, None] / norms)[0].clamp(min=U)
        order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
        moved = (dk.min_norm_weights(gram[order][:, order]) - weights[order]) * norms[order]
        assert (moved.abs() <= 8 * K * (K + 1) * U * size / smallest).all(), seed
        assert (moved / norms[order] @ J[order]).norm() <= tolerances.EQUAL**0.5 * size
        for exponent in (-100, 40):
            assert torch.equal(dk.min_norm_weights(gram * 4.0**exponent), weights)


def test_short_gradient_between_long_ones(backend):
    """Lengths 1, 4e6 and 4e6: the direction was several times too long, and an objective ascended."""
    long = 4e6
    J = torch.tensor([[long, 0.6 * long, 1.0], [-long, 0.2 * long, 0.0], [0.0, -1.0, 0.1]], dtype=torch.float64)
    for order in itertools.permutations(range(3)):
        rows = J[list(order)]
        least, exact = solve_exactly(rows.tolist())
        weights = dk.min_norm_weights(gram_of(rows))
        assert (rows @ (weights @ rows) >= 0).all()
        assert (weights @ rows).norm() <= (1 + 1e-6) * float(least) ** 0.5
        close_to = torch.tensor([float(w) for w in exact], dtype=torch.float64)
        assert ((weights - close_to) * rows.norm(dim=1)).abs().max() <= 1e-9


@pytest.mark.parametrize("K", range(3, 9))
def test_chain_of_almost_equal_gradients_in_any_order(backend, K):
    """Neighbours are equal within rounding, so all are: the same weights in any order."""
    step = (0.9 * 2 * tolerances.EQUAL) ** 0.5
    J = torch.stack([torch.ones(K, dtype=torch.float64), step * torch.arange(K)], dim=1)
    for seed in range(4):
        order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
        weights = dk.min_norm_weights(gram_of(J[order]))
        assert (weights - 1 / K).abs().max() <= 4 * U


@pytest.mark.parametrize("K", range(2, 9))
def test_is_never_longer_than_slsqp(backend, K):
    """SLSQP, asked for 1e-12, gets within 1e-6 (scipy's default) of the smallest square; never below ours."""
    for family, J in families(K).items():
        gram = gram_of(J)
        gram = gram / gram.diagonal().max().clamp(min=1e-300)
        A = gram.cpu().numpy()
        found = minimize(
            lambda x, A=A: x @ A @ x,
            [1 / K] * K,
            jac=lambda x, A=A: 2 * A @ x,
            bounds=[(0, 1)] * K,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": lambda x: [1.0] * len(x)},
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 500},
        )
        theirs = torch.from_numpy(found.x).to(gram.device).clamp(min=0)
        theirs /= theirs.sum()
        ours = dk.min_norm_weights(gram)
        excess = (theirs @ gram @ theirs - ours @ gram @ ours).item()
        rounding = tolerances.kkt_gap_bound(gram)
        assert -rounding <= excess <= 1e-6 + rounding, family


@pytest.mark.parametrize("family", FAMILIES)
def test_two_objectives_by_the_printed_formula(backend, family):
    """Eq. 11, clamped to the segment. Wherever the gradients differ by more than rounding."""
    for seed in range(5):
        gram = gram_of(families(2, seed)[family])
        (g11, g12), (_, g22) = gram.tolist()
        distance = g11 + g22 - 2 * g12
        if distance <= 1e-6 * (g11 + g22):
            continue
        first = min(max((g22 - g12) / distance, 0), 1)
        expected = torch.tensor([first, 1 - first], dtype=torch.float64)
        # 3 roundings of numerator and of denominator, of at most g11 + g22 + 2 |g12| <= 2 (g11 + g22); 1 more each
        bound = 4 * 2 * (g11 + g22) / distance * 2 * U
        assert (dk.min_norm_weights(gram) - expected).abs().max() <= bound


@pytest.mark.parametrize("K", range(2, 9))
@pytest.mark.parametrize("family", GENERIC)
def test_permutation_of_objectives(backend, family, K):
    gram = gram_of(families(K)[family])
    weights = dk.min_norm_weights(gram)
    for seed in range(3):
        order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
        permuted = dk.min_norm_weights(gram[order][:, order])
        assert (permuted - weights[order]).abs().max() <= 2 * tolerances.weights_bound(gram)


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_scale_of_all_gradients(backend, family, K):
    """A power of two scales without a rounding, so the weights keep their bits: no threshold depends on the scale."""
    gram = gram_of(families(K)[family])
    weights = dk.min_norm_weights(gram)
    for exponent in (-400, -50, 50, 400):
        assert torch.equal(dk.min_norm_weights(gram * 2.0**exponent), weights)


@pytest.mark.parametrize("K", range(1, 9))
def test_equal_gradients_share_equally(backend, K):
    gram = gram_of(families(K)["equal"])
    expected = torch.full((K,), 1 / K, dtype=torch.float64)
    for clamp in (True, False):
        assert (dk.min_norm_weights(gram, clamp=clamp) - expected).abs().max() <= 2 * U


@pytest.mark.parametrize("K", range(3, 9))
def test_two_equal_gradients_share_their_part(backend, K):
    J = families(K)["two equal"]
    weights = dk.min_norm_weights(gram_of(J))
    assert weights[0] == weights[-1]
    alone = dk.min_norm_weights(gram_of(J[:-1]))
    expected = torch.cat([alone[:1] / 2, alone[1:], alone[:1] / 2])
    assert (weights - expected).abs().max() <= 2 * tolerances.weights_bound(gram_of(J[:-1]))


@pytest.mark.parametrize("K", range(3, 9))
def test_chain_of_almost_equal_gradients(backend, K):
    """Each equal to the next within rounding, but the first not to the last: the weights still sum to 1."""
    step = (0.9 * 2 * tolerances.EQUAL) ** 0.5  # between neighbours 0.9 of the threshold, between others above it
    J = torch.stack([torch.ones(K, dtype=torch.float64), step * torch.arange(K)], dim=1)
    weights = dk.min_norm_weights(gram_of(J))
    assert (weights >= 0).all()
    assert abs(weights.sum().item() - 1) <= 2 * K * U


@pytest.mark.parametrize("K", range(2, 9))
@pytest.mark.parametrize("family", GENERIC)
def test_affine_solution(backend, family, K):
    """clamp=False: all <g_i, d> equal ||d||^2 (Cor. 3.2, 3.3 for any K), and it is the affine system's solution."""
    for seed in range(3):
        gram = gram_of(families(K, seed)[family])
        weights = dk.min_norm_weights(gram, clamp=False)
        assert abs(weights.sum().item() - 1) <= 2 * K * U * weights.abs().sum().item()
        system = torch.ones(K + 1, K + 1, dtype=torch.float64)
        scale = gram.diagonal().max()
        system[:K, :K] = gram / scale
        system[K, K] = 0
        expected = torch.linalg.solve(system, torch.eye(K + 1, dtype=torch.float64)[K])[:K]
        bound = 2 * tolerances.weights_bound(gram) * weights.abs().sum()
        assert (weights - expected).abs().max() <= bound
        shares = gram @ weights
        assert (shares - weights @ shares).abs().max() <= scale * K * bound


def test_affine_solution_may_leave_the_simplex(backend):
    gram = torch.tensor([[1.0, 1.5], [1.5, 4.0]])
    assert dk.min_norm_weights(gram).tolist() == [1.0, 0.0]
    expected = torch.tensor([1.25, -0.25], dtype=torch.float64)
    assert (dk.min_norm_weights(gram, clamp=False) - expected).abs().max() <= 4 * U


@pytest.mark.parametrize("K", [2, 3, 5])
def test_affine_equals_clamped_inside_the_simplex(backend, K):
    J = torch.eye(K, dtype=torch.float64) + 0.1 * families(K, n=K)["random"]
    gram = gram_of(J)
    weights = dk.min_norm_weights(gram)
    assert (weights > 0).all()
    assert torch.equal(weights, dk.min_norm_weights(gram, clamp=False))


def test_corollaries_inside_the_segment(backend):
    """Cor. 3.2, 3.3: <d, g_1> = <d, g_2> = ||d||^2 = (g11 g22 - g12^2) / ||g_1 - g_2||^2 for 0 < pi_1 < 1."""
    inside = 0
    for seed in range(20):
        for family in ("random", "conflicting", "aligned", "opposite"):
            J = families(2, seed)[family]
            gram = gram_of(J)
            weights = dk.min_norm_weights(gram)
            if not ((weights > 0) & (weights < 1)).all():
                continue
            inside += 1
            d = direction(J, weights)
            (g11, g12), (_, g22) = gram.tolist()
            # d errs by |dpi| ||g_1 - g_2||, and <d, g_i> by ||g_i|| of it
            error = tolerances.weights_bound(gram) * 4 * gram.diagonal().max().item()
            length2 = d.square().sum().item()
            assert (J @ d - length2).abs().max() <= error
            assert abs(length2 - (g11 * g22 - g12 * g12) / (J[0] - J[1]).square().sum().item()) <= error
    assert inside >= 20


def test_length_of_the_direction(backend):
    """Bounds on ||d||, each under the condition it needs (the paper states its Eq. 16 and 17 without them).

    With <g_1, g_2> >= 0: 1 / g11 + 1 / g22 >= 1 / ||d||^2; with <g_1, g_2> <= 0 the other way round. For unequal
    lengths: ||d|| <= ||g_1|| ||g_2|| / | ||g_1|| - ||g_2|| |, inside the segment. Always: ||d|| <= ||g_i||.
    """
    seen = {True: 0, False: 0}
    for seed in range(30):
        for family in ("random", "aligned", "conflicting"):
            J = families(2, seed)[family]
            gram = gram_of(J)
            weights = dk.min_norm_weights(gram)
            (g11, g12), (_, g22) = gram.tolist()
            length2 = (weights @ gram @ weights).item()
            rounding = tolerances.kkt_gap_bound(gram)
            assert length2 <= min(g11, g22) + rounding
            orthogonal = g11 * g22 / (g11 + g22)
            if g12 >= 0:
                assert length2 >= orthogonal - rounding
            else:
                assert length2 <= orthogonal + rounding
            if ((weights > 0) & (weights < 1)).all():
                assert length2 <= g11 * g22 / (g11**0.5 - g22**0.5) ** 2 + rounding
            seen[g12 >= 0] += 1
    assert min(seen.values()) >= 20


@pytest.mark.parametrize("K", [2, 3, 8])
def test_present(backend, K):
    """Absent objectives get exactly 0, and the others what they get on their own."""
    gram = gram_of(families(K)["random"])
    for mask in range(1, 1 << K, 1 + K * K // 4):
        present = torch.tensor([bool(mask >> i & 1) for i in range(K)])
        weights = dk.min_norm_weights(gram, present=present)
        assert (weights[~present] == 0).all()
        assert torch.equal(weights[present], dk.min_norm_weights(gram[present][:, present]))
    assert dk.min_norm_weights(gram, present=torch.zeros(K, dtype=torch.bool)).tolist() == [0.0] * K


def test_zero_gradient_that_is_present_takes_all(backend):
    gram = gram_of(families(3, seed=1)["one zero"])
    assert dk.min_norm_weights(gram).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_float_gram(backend, dtype):
    """A Gram matrix of another type is converted, not computed with."""
    gram = torch.tensor([[18.0, -22.0], [-22.0, 38.0]], dtype=dtype)
    assert torch.equal(dk.min_norm_weights(gram), dk.min_norm_weights(gram.double()))


def test_layout_of_gram(backend):
    gram = gram_of(families(3)["random"])
    weights = dk.min_norm_weights(gram)
    strided = torch.zeros(6, 6, dtype=torch.float64)[::2, ::2].copy_(gram)
    assert torch.equal(dk.min_norm_weights(strided), weights)


def test_changes_nothing(backend):
    gram = gram_of(families(4)["random"]).requires_grad_()
    before = gram.detach().clone()
    assert not dk.min_norm_weights(gram).requires_grad
    assert torch.equal(gram.detach(), before)
