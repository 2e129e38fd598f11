"""dk.min_norm_weights: the shortest point of conv{g_1, ..., g_K} (Eq. 9-12), against exact and published solvers."""

import itertools
from fractions import Fraction

import pytest
import torch
from scipy.optimize import minimize

import dtokd_kernels as dk

from . import tolerances
from .inputs import FAMILIES, families

#: Affinely independent gradients: weights are unique, and well enough conditioned to be compared.
GENERIC = ("random", "aligned", "tiny", "huge")
U = 2.0**-53


def gram_of(J):
    return J @ J.T


def direction(J, weights):
    return weights @ J


def kkt_gap(gram, weights):
    """How far some <g_i, d> falls short of ||d||^2: 0 at the min-norm point, and nowhere else."""
    Gw = gram @ weights
    return (weights @ Gw - Gw.min()).item()


def solve_exactly(rows):
    """Min-norm weights of integer gradients in rational arithmetic: every face of the simplex, no rounding at all.

    Of faces with the same point the smallest comes first, so affinely dependent gradients get a solution too.
    """
    K = len(rows)
    G = [[Fraction(sum(a * b for a, b in zip(x, y, strict=True))) for y in rows] for x in rows]
    best = None
    for size in range(1, K + 1):
        for face in itertools.combinations(range(K), size):
            # stationarity on the face: G_face w = lambda 1, sum w = 1
            system = [[G[i][j] for j in face] + [Fraction(-1), Fraction(0)] for i in face]
            system.append([Fraction(1)] * size + [Fraction(0), Fraction(1)])
            solution = _solve_linear(system)
            if solution is None or min(solution[:size]) < 0:
                continue
            weights = [Fraction(0)] * K
            for i, w in zip(face, solution[:size], strict=True):
                weights[i] = w
            value = sum(weights[i] * weights[j] * G[i][j] for i in range(K) for j in range(K))
            if best is None or value < best[0]:
                best = value, weights
    return best


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
