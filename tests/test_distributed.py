"""Balanced steps on several ranks: the same bits on all of them, and the step of one process on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dtokd_kernels as dk

from .ranks import ddp, filled, fsdp, one_loss
from .ranks.pool import Pool

ROOT = Path(__file__).parents[1]
#: With the store of torchrun's rendezvous, gloo of torch 2.14 finds the addresses of the processes before a restart.
ELASTIC = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def pools():
    made = {size: Pool(size) for size in (2, 3)}
    yield made
    for pool in made.values():
        pool.close()


def assert_same_bits(answers) -> None:
    first = answers[0]
    for other in answers[1:]:
        for mine, theirs in zip(first, other, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert torch.equal(a, b)


def assert_as_one(answers, options, train=ddp.train) -> None:
    """To rounding: float64, a few hundred additions; AdamW's division of small by small magnifies."""
    alone = train(0, 1, options)
    for mine, theirs in zip(answers[0], alone, strict=True):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


CASES = {
    "adamw": {},
    "sgd": {"rule": "sgd", "rescale": "sum"},
    "three": {"size": 3},
    "one_bucket": {"bucket_bytes": 25 << 20},
    "clipped": {"max_norm": 0.1},
    "balanced": {"private": "balanced"},
    "plain_head": {"balance_head": False},
    "static": {"static": True},
    "unwrapped": {"wrapped": False, "other_start": True, "size": 3},
    "find_unused": {"find_unused": True},
    "kept_memory": {"to_none": False},
    "parts": {"parts": 2},
    "parts_unwrapped": {"parts": 2, "wrapped": False},
    "kept_parts": {"parts": 2, "to_none": False},
    "parts_feature": {"parts": 2, "source": "feature"},
    "zeros": {"zeros": True},
    "zeros_overlap": {"zeros": True, "source": "overlap", "size": 3},
    "zeros_lag": {"zeros": True, "source": "lag"},
    "zeros_probe": {"zeros": True, "source": "found"},
    "one_rank_reaches": {"sometimes": 2},
    "two_ranks_reach": {"sometimes": 3, "size": 3},
    "overlap": {"source": "overlap"},
    "overlap_parts": {"source": "overlap", "parts": 2, "size": 3},
    "lag": {"source": "lag"},
    "probe": {"source": "probe"},
    "found_probe": {"source": "found", "size": 3},
    "feature": {"source": "feature"},
    "every": {"source": "every"},
    "ema": {"source": "ema", "size": 3},
    "amortized": {"source": "none", "weighting": "amortized", "size": 3},
    "random": {"source": "none", "weighting": "rlw"},
    "pcgrad": {"weighting": "pcgrad"},
    "scaled": {"scaled": True, "max_norm": 0.1},
}


@pytest.mark.parametrize("name", CASES)
def test_ddp_is_one_process_on_the_whole_batch(pools, name):
    options = dict(CASES[name])
    answers = pools[options.pop("size", 2)].run(ddp.train, options)
    assert_same_bits(answers)
    assert_as_one(answers, options)


SHARD_CASES = ["adamw", "sgd", "three", "clipped", "balanced", "plain_head", "static", "unwrapped", "parts"]
SHARD_CASES += [
    "zeros",
    "zeros_overlap",
    "kept_memory",
    "kept_parts",
    "two_ranks_reach",
    "overlap",
    "overlap_parts",
    "probe",
    "feature",
    "every",
    "amortized",
    "scaled",
]


@pytest.mark.parametrize("name", SHARD_CASES)
def test_sharded_is_one_process_on_the_whole_batch(pools, name):
    options = {**CASES[name], "shard": True}
    answers = pools[options.pop("size", 2)].run(ddp.train, options)
    assert_same_bits(answers)
    assert_as_one(answers, options)


def test_unattached_module_is_refused(pools):
    for message in pools[2].run(ddp.not_attached):
        assert "DTOAdamW.backward" in message
        assert "distributed.attach(optimizer, module)" in message


def test_plain_backward_is_refused(pools):
    assert all("optimizer.backward(losses)" in m for m in pools[2].run(ddp.plain_backward))


@pytest.mark.parametrize("shard", [False, True])
def test_errors_name_what_the_user_called(pools, shard):
    assert all(m.startswith("DTOSGD.backward: ") for m in pools[2].run(ddp.sparse_gradient, shard))


def test_attach_takes_no_nonsense(pools):
    for messages in pools[2].run(ddp.nonsense):
        for name, message in zip(("bucket_bytes", "static_graph", "shard"), messages, strict=True):
            assert message.startswith(f"attach: {name} is 'no'; pass ")


@pytest.mark.parametrize(("source", "shard"), [("exact", False), ("exact", True), ("overlap", False), ("lag", False)])
def test_groups_that_change(pools, source, shard):
    answers = pools[2].run(ddp.changing_groups, shard, source)
    assert_same_bits(answers)
    for mine, theirs in zip(answers[0], ddp.changing_groups(0, 1, shard, source), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shard", [False, True])
def test_a_group_that_comes_later_begins_alike(pools, shard):
    """Its values are those of rank 0."""
    answers = pools[2].run(ddp.late_group, shard)
    assert_same_bits(answers)
    for a, b in zip(answers[0][0], ddp.late_group(0, 1, shard)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_ranks_that_come_later_are_found(pools):
    for messages in pools[2].run(ddp.ranks_that_come_later):
        assert all("distributed.attach(optimizer, module)" in message for message in messages)


def test_whole_state_of_a_model_that_the_first_rank_does_not_train(pools):
    nobody, held = pools[2].run(ddp.state_of_some_ranks)
    assert nobody is None
    assert held == [["exp_avg", "exp_avg_sq", "step"]] * 4


@pytest.mark.parametrize(("source", "shard"), [("exact", False), ("exact", True), ("overlap", False), ("lag", False)])
def test_gradient_that_is_undefined(pools, source, shard):
    answers = pools[2].run(ddp.undefined_gradient, source, shard)
    assert_same_bits(answers)
    for mine, theirs in zip(answers[0], ddp.undefined_gradient(0, 1, source, shard), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_step_on_gradients_of_one_rank_is_refused(pools):
    assert all("no_sync" in m for m in pools[2].run(ddp.step_in_no_sync))


def test_parameter_that_nobody_would_average_is_refused(pools):
    assert all("'2.weight'" in m and "requires_grad_(False)" in m for m in pools[2].run(ddp.missing_parameter))


@pytest.mark.parametrize(("source", "shard"), [("exact", False), ("exact", True), ("overlap", False), ("lag", False)])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_on_one_rank_skips_the_step_on_all(pools, where, source, shard):
    answers = pools[2].run(ddp.nan_on_one, where, source, shard)
    assert all(same and skipped == 1 for same, skipped, _ in answers)


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("shard", [False, True])
def test_overflow_on_one_rank_lowers_the_scale_on_all(pools, shard, where):
    assert pools[2].run(ddp.overflow_on_one, shard, where) == [(True, 1, 512.0)] * 2


PRECISIONS = {
    "rounded": {},
    "moments": {"state_dtype": torch.float32},
    "masters": {"state_dtype": torch.float32, "master_weights": True},
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_precision_of_the_state_is_kept_in_parts(pools, name):
    """bfloat16 parameters on two ranks: shards and FSDP have dtypes and numbers of replicas, but for its roundings."""
    # SGD: AdamW divides small by small, where a rounding may turn a sign around
    options = {"dtype": torch.bfloat16, "precision": PRECISIONS[name], "rule": "sgd", "momentum": True}
    expected = pools[2].run(ddp.train, options)[0]
    for found in (pools[2].run(ddp.train, {**options, "shard": True}), pools[2].run(fsdp.train, options)):
        assert_same_bits(found)
        for values, wanted in zip(found[0], expected, strict=True):
            for a, b in zip(values, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-8)
        if name == "masters":
            state = iter(found[0][2])
            masters = [t for t in state if t.dtype == torch.float32 and t.dim()]
            assert masters
            assert not all(torch.equal(t, t.bfloat16().float()) for t in masters)


@pytest.mark.parametrize("what", ["constant", "missing", "share"])
def test_error_on_one_rank_stops_the_others_at_once(pools, what):
    messages, weights = zip(*pools[3].run(ddp.error_on_one, what), strict=True)
    assert "ranks" in messages[0]
    assert "ranks" in messages[2]
    if what == "constant":
        assert "needs no gradient" in messages[1]
    if what == "share":
        assert "shares of this step's calls sum to 1.25" in messages[1]
    assert_same_bits([[w] for w in weights])


def test_balance_is_logged_once(pools, tmp_path):
    pools[2].run(ddp.logged_lines, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["0.csv"]
    assert len((tmp_path / "0.csv").read_text().splitlines()) == 1 + 3


def test_accumulation_communicates_once(pools):
    """Two steps: in each one small all-reduce and one bucket per objective, for any number of parts."""
    once, often = (pools[2].run(ddp.many_microbatches_cost, parts)[0] for parts in (1, 3))
    assert once == often
    reduced = [n for name, n, _ in once if name == "all_reduce"]
    assert reduced[:3] == [11, *2 * [reduced[1]]]
    assert len(reduced) == 3 + 5  # the second step knows what comes last: a bucket more for each objective


FSDP_CASES = {
    "adamw": {},
    "sgd": {"rule": "sgd"},
    "three": {"size": 3, "max_norm": 0.1},
    "root_only": {"blocks": False},
    "kept_unsharded": {"reshard": False},
    "plain_head": {"balance_head": False, "private": "balanced"},
    "parts": {"parts": 2},
    "feature": {"source": "feature", "size": 3},
    "every": {"source": "every"},
    "ema": {"source": "ema"},
    "amortized": {"source": "none", "weighting": "amortized", "max_norm": 0.1},
}


@pytest.mark.parametrize("name", FSDP_CASES)
def test_fsdp_is_one_process_on_the_whole_batch(pools, name):
    options = dict(FSDP_CASES[name])
    answers = pools[options.pop("size", 2)].run(fsdp.train, options)
    assert_same_bits(answers)
    assert_as_one(answers, options, fsdp.train)


HSDP_CASES = {
    "adamw": {"max_norm": 0.1},
    "parts": {"parts": 3, "rule": "sgd"},
    "feature": {"source": "feature"},
    "amortized": {"source": "none", "weighting": "amortized"},
}


@pytest.fixture(scope="module")
def four():
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.mark.parametrize("name", HSDP_CASES)
def test_two_replicas_of_two_shards_are_one_process_on_the_whole_batch(four, name):
    options = {**HSDP_CASES[name], "replicas": 2}
    answers = four.run(fsdp.train, options)
    assert_same_bits(answers)
    assert_as_one(answers, options, fsdp.train)


FILLED_CASES = {
    "ddp": {"way": "ddp"},
    "ddp_lamb": {"way": "ddp", "opt": "lamb", "size": 3},
    "ddp_lion": {"way": "ddp", "opt": "lion"},
    "ddp_adan": {"way": "ddp", "opt": "adan", "parts": 2},
    "ddp_muon": {"way": "ddp", "opt": "muon", "size": 3},
    "ddp_two": {"way": "ddp", "opt": "two"},
    "ddp_lookahead": {"way": "ddp", "opt": "lookahead_sgd", "find_unused": True},
    "ddp_kept": {"way": "ddp", "opt": "sgd", "parts": 3, "to_none": False, "max_norm": 0.1},
    "ddp_scaled": {"way": "ddp", "opt": "sgd", "scaled": True, "max_norm": 0.1},
    "ddp_feature": {"way": "ddp", "source": "feature", "size": 3},
    "ddp_overlap": {"way": "ddp", "source": "overlap", "private": "balanced", "size": 3},
    "ddp_probe": {"way": "ddp", "source": "probe", "parts": 2},
    "ddp_every": {"way": "ddp", "source": "every", "weighting": "pcgrad"},
    "ddp_amortized": {"way": "ddp", "source": "none", "weighting": "amortized"},
    "attached": {"way": "attached", "static": True, "size": 3},
    "attached_two": {"way": "attached", "opt": "two"},
    "unwrapped": {"way": "unwrapped", "parts": 2, "size": 3},
    "fsdp": {"way": "fsdp"},
    "fsdp_lamb": {"way": "fsdp", "opt": "lamb"},
    "fsdp_lion": {"way": "fsdp", "opt": "lion", "size": 3},
    "fsdp_adan": {"way": "fsdp", "opt": "adan"},
    "fsdp_muon": {"way": "fsdp", "opt": "muon"},
    "fsdp_two": {"way": "fsdp", "opt": "two", "size": 3},
    "fsdp_parts": {"way": "fsdp", "opt": "sgd", "parts": 2, "max_norm": 0.1, "to_none": False},
    "fsdp_scaled": {"way": "fsdp", "opt": "sgd", "scaled": True, "max_norm": 0.1, "size": 3},
    "fsdp_feature": {"way": "fsdp", "source": "feature"},
    "fsdp_ema": {"way": "fsdp", "source": "ema", "private": "balanced", "size": 3},
    "hsdp": {"way": "fsdp", "size": 4},
    "fsdp_amortized": {"way": "fsdp", "source": "none", "weighting": "amortized"},
}


@pytest.mark.parametrize("name", FILLED_CASES)
def test_any_optimizer_is_one_process_on_the_whole_batch(pools, request, name):
    """Weights, balances and `.grad` of `dk.backward` with torch's and timm's optimizers."""
    options = dict(FILLED_CASES[name])
    size = options.pop("size", 2)
    pool = request.getfixturevalue("four") if size == 4 else pools[size]
    answers = pool.run(filled.train, {**options, "replicas": 2 if size == 4 else 1})
    assert_same_bits(answers)
    muon = options.get("opt") in ("muon", "two")  # which computes in bfloat16
    close = {"rtol": 2**-6, "atol": 2**-8} if muon else {"rtol": 1e-9, "atol": 1e-10}
    for mine, theirs in zip(answers[0], filled.train(0, 1, options), strict=True):
        assert len(mine) == len(theirs) > 0
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_any_optimizer_skips_on_all_ranks_what_one_has(pools, way):
    assert pools[2].run(filled.spoiled, way, "nan") == [(True, True, True, 1.0)] * 2
    assert pools[2].run(filled.spoiled, way, "scaled") == [(True, False, True, 512.0)] * 2


def test_any_optimizer_refuses_what_would_drift_apart(pools):
    for incomplete, beside, sharded, fewer, more, plain in pools[2].run(filled.refusals):
        assert incomplete.startswith("backward: the module's parameter '2.weight' is not in params")
        assert "params has a parameter (7,) beside" in beside
        assert "distributed.attach(params, module)" in beside
        assert "shard=True divides the state of DTOAdamW and DTOSGD" in sharded
        assert fewer.startswith("backward: params lacks a parameter (4, 4)")
        assert "params has a parameter (7,) beside" in more
        assert "call dtokd_kernels.backward(losses, params)" in plain


def test_any_optimizer_lets_its_model_go(pools):
    answers = pools[2].run(filled.let_go)
    assert [gone for gone, _ in answers] == [[True, True]] * 2
    assert torch.equal(answers[0][1], answers[1][1])


def test_two_replicas_of_two_shards_skip_together(four):
    assert four.run(fsdp.nan_on_one, {"replicas": 2}) == [(True, 1)] * 4


def test_fsdp_nan_on_one_rank_skips_the_step_on_all(pools):
    assert pools[3].run(fsdp.nan_on_one, {}) == [(True, 1)] * 3


@pytest.mark.parametrize("source", ["overlap", "lag", "probe", "found"])
def test_fsdp_refuses_sources_that_see_unreduced_gradients(pools, source):
    assert all("gram='exact'" in message for message in pools[2].run(fsdp.refused, source))


def test_fsdp_without_reduction_is_refused(pools):
    assert all("set_requires_gradient_sync" in message for message in pools[2].run(fsdp.unsynced))


def test_fsdp_refuses_a_later_group_that_is_not_sharded(pools):
    for message, added in pools[2].run(fsdp.late_group):
        assert "one of shape (3,) is not, so nobody averages its gradient" in message
        assert added == 0


def test_fsdp_state_is_divided_by_the_ranks(pools):
    held, whole, rows = zip(*pools[3].run(fsdp.state_numbers), strict=True)
    assert sum(held) == whole[0]
    assert max(held) <= whole[0] / 3 + rows[0]  # a row of each parameter at most


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 2)])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_fsdp_checkpoint_of_n_ranks_goes_on_with_m(pools, tmp_path, first, second, rule):
    straight = pools[first].run(fsdp.save, {"rule": rule}, str(tmp_path))
    resumed = pools[second].run(fsdp.load, {"rule": rule}, str(tmp_path))
    for a, b in zip(straight[0], resumed[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 2)])
def test_sharded_checkpoint_of_n_ranks_goes_on_with_m(pools, tmp_path, first, second):
    straight = pools[first].run(ddp.sharded_checkpoint, str(tmp_path), False)
    resumed = pools[second].run(ddp.sharded_checkpoint, str(tmp_path), True)
    for a, b in zip(straight[0][0], resumed[0][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    rows = [-(-p.numel() // 8) for p in straight[0][0]]  # of 8 numbers
    for size, answers in ((first, straight), (second, resumed)):
        assert sum(held for _, held in answers) == 8 * sum(rows)
        assert max(held for _, held in answers) <= 8 * (sum(rows) / size + len(rows))  # a row of each at most


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("shard", [False, True])
def test_three_ranks_repeat_their_bits_after_a_checkpoint(pools, shard, masters):
    """Three numbers are added up in an order that depends on the buckets, which the first step changes."""
    straight, stopped = (pools[3].run(ddp.resumed, shard, masters, stop) for stop in (False, True))
    assert_same_bits([*straight, *stopped])


@pytest.mark.parametrize(
    ("rule", "how"),
    [*((rule, "ddp") for rule in one_loss.RULES), *((rule, "fsdp") for rule in one_loss.RULES if rule != "probe")],
)
def test_one_loss_is_one_process_on_the_whole_batch(pools, rule, how):
    """A trainer that takes one loss, with `BalancedLoss`: DDP and FSDP2 do what they do with any loss."""
    answers = pools[2].run(one_loss.train, rule, how)
    assert_same_bits(answers)
    for mine, theirs in zip(answers[0], one_loss.train(0, 1, rule, how), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_audiocrafts_averages_are_those_of_all_items(pools):
    first, second = pools[2].run(one_loss.audiocraft)
    assert all(map(torch.equal, first, second))
    for mine, theirs in zip(first, one_loss.audiocraft(0, 1), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


def test_one_loss_that_a_rank_refuses(pools):
    first, second = pools[2].run(one_loss.refused_by_one)
    assert first.startswith("BalancedLoss: losses['1'] needs no gradient")
    assert second.startswith("BalancedLoss: 1 of 2 ranks raised an error about their losses")


def test_sharded_refuses_what_it_cannot_do(pools):
    for lag, state, layout in pools[2].run(ddp.sharded_refusals):
        assert "'overlap'" in lag
        assert "attach it before" in state
        assert "contiguous_format" in layout


@pytest.mark.parametrize("kind", ["replicate", "shard"])
def test_rank_that_dies_ends_the_others_and_torchrun_resumes(tmp_path, kind):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    # on a busy machine torch's own teardown may crash a rank that is done: one life more then has nothing left to do
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    command += ["-m", "tests.ranks.elastic", str(folder), kind]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ELASTIC, "PYTHONPATH": path}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("life 0 rank 0 begins after step 0") == 1
    assert "life 1 rank 0 begins after step 2" in ran.stdout  # 3 was half written
    assert "life 1 rank 1 begins after step 2" in ran.stdout
    weights = torch.load(folder / "weights.pt")
    for a, b in zip(weights, elastic_alone(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def elastic_alone():
    """The weights that one process reaches that never stops."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    optimizer = dk.DTOAdamW(net.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        out = net(torch.randn(8, 4, dtype=torch.float64, generator=generator))
        optimizer.backward({"task": out.square().mean(), "distill": (out - 1).square().mean()})
        optimizer.step()
        optimizer.zero_grad()
    return list(net.parameters())


def test_one_process_imports_nothing_of_it():
    """A torch without torch.distributed can train."""
    script = """if True:
        import sys, torch
        torch.distributed.is_available = lambda: False
        import dtokd_kernels as dk
        w = torch.nn.Parameter(torch.ones(3))
        optimizer = dk.DTOSGD([w], lr=0.1)
        optimizer.backward([w.square().sum() + 1, (w - 2).square().sum() + 1])
        optimizer.step()
        dk.backward([w.square().sum() + 1, (w - 2).square().sum() + 1], [w])
        assert not [name for name in sys.modules if name.startswith("dtokd_kernels.distributed")]
        """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
