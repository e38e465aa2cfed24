import copy
import random
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import normlab
from normlab.errors import InputError
from normlab.surgery import estimate, recalibrate

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norms(model):
    kinds = nn.modules.batchnorm._BatchNorm
    return {name: each for name, each in model.named_modules() if isinstance(each, kinds)}


def over_all(model, batches, **options):
    return estimate(model, batches, norms(model), **options)


def truth(*values):
    """Mean and variance of each channel of all values, channels second, as NumPy has them."""
    every = np.concatenate(
        [each.double().movedim(1, -1).reshape(-1, each.shape[1]).numpy() for each in values]
    )
    return torch.tensor(every.mean(0)), torch.tensor(every.var(0))


def assert_right(found, *values, **tolerance):
    mean, var = truth(*values)
    assert found.count == sum(each.numel() for each in values) // values[0].shape[1]
    assert_close(found.mean, mean, **(tolerance or EXACT))
    assert_close(found.var, var, **(tolerance or EXACT))


# ------------------------------------------------------------------------------- moments


@settings(deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=6),
    spatial=st.lists(st.integers(1, 4), max_size=1),
    offset=st.sampled_from([0.0, -3.0, 1e4]),
)
def test_every_value_weighs_the_same_however_it_is_batched(sizes, spatial, offset):
    batches = [offset + i + randn(n, 3, *spatial, seed=i) for i, n in enumerate(sizes)]
    found = over_all(nn.BatchNorm1d(3).double(), batches).layers[""]
    assert_right(found, *batches, rtol=1e-10, atol=1e-12)
    assert (found.batches, found.samples) == (len(sizes), sum(sizes))
    counts = np.array([batch[:, 0].numel() for batch in batches])
    means = np.stack([truth(batch)[0].numpy() for batch in batches])
    if len(sizes) > 1:
        shares = counts[:, None] / counts.sum()
        spread = (shares**2 * (means - (shares * means).sum(0)) ** 2).sum(0)
        expected = torch.tensor((spread * len(sizes) / (len(sizes) - 1)) ** 0.5)
        assert_close(found.standard_error, expected, rtol=1e-9, atol=1e-12)
    else:
        assert found.standard_error.isinf().all()


def test_of_equal_batches_the_standard_error_is_the_usual_one():
    batches = [randn(4, 2, seed=seed) for seed in range(10)]
    means = torch.stack([batch.mean(0) for batch in batches])
    found = over_all(nn.BatchNorm1d(2).double(), batches).layers[""]
    assert_close(found.standard_error, means.std(0) / 10**0.5, **EXACT)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_large_inputs_are_summed_in_parts(format):
    x = (5 + randn(33, 3, 64, 65)).float().contiguous(memory_format=format)
    assert_right(over_all(nn.BatchNorm2d(3), [x]).layers[""], x)


def test_a_mean_far_above_the_deviation_costs_no_digits():
    batches = [(1e4 + 1e-2 * randn(64, 3, seed=seed)).float() for seed in range(5)]
    assert_right(over_all(nn.BatchNorm1d(3), batches).layers[""], *batches, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float64(dtype):
    batches = [(3 + randn(50, 3, seed=seed)).to(dtype) for seed in range(3)]
    assert_right(over_all(nn.BatchNorm1d(3).to(dtype), batches).layers[""], *batches)


def test_a_layer_gets_what_the_layers_before_make_of_it_in_training():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)).double()
    model[1].running_mean.fill_(100)
    batches = [randn(n, 3, seed=n) for n in (5, 20, 3)]
    firsts = [model[0](batch).detach() for batch in batches]
    parts = [truth(first) for first in firsts]
    seconds = [
        (((first - mean) / (var + 1e-5).sqrt()).relu())
        for first, (mean, var) in zip(firsts, parts, strict=True)
    ]
    found = over_all(model.eval(), batches).layers
    assert_right(found["1"], *firsts)
    assert_right(found["3"], *seconds)
    running = over_all(model, batches, by_batch=False).layers
    assert_right(running["1"], *firsts)
    assert_right(running["3"], *[((first - 100) / (1 + 1e-5) ** 0.5).relu() for first in firsts])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3).double()
        self.unused = nn.BatchNorm1d(3)

    def forward(self, x, y):
        return self.norm(x), self.norm(input=y)


def test_a_layer_that_is_called_twice_pools_its_inputs():
    batches = [{"x": randn(4, 3, seed=i), "y": 2 + randn(3, 3, 5, seed=i)} for i in range(3)]
    found = over_all(Twice(), batches).layers
    assert list(found) == ["norm"]
    assert_right(found["norm"], *[each for batch in batches for each in batch.values()])
    assert (found["norm"].batches, found["norm"].samples) == (3, 21)
    # A batch's mean is that of both calls.
    means = torch.stack([truth(*batch.values())[0] for batch in batches])
    assert_close(found["norm"].standard_error, means.std(0) / 3**0.5, **EXACT)


@pytest.mark.parametrize("by_batch", [True, False])
@pytest.mark.parametrize("key", ["mask", "lengths"])
def test_only_what_is_real_counts(key, by_batch):
    layer = normlab.BatchNorm1d(3).double()
    batches, real = [], []
    for seed in range(3):
        x, lengths = randn(4, 3, 5, seed=seed), torch.tensor([5, 2, 0, seed])
        mask = torch.arange(5) < lengths[:, None]
        x[2] = torch.nan  # Padding may hold anything.
        batches.append({"input": x, key: mask if key == "mask" else lengths})
        real.append(x.movedim(1, -1)[mask])
    found = over_all(layer, batches, by_batch=by_batch).layers[""]
    assert_right(found, *real)
    assert found.samples == 12


def test_masks_that_do_not_fit_are_the_layers_to_refuse():
    layer = normlab.BatchNorm1d(3)
    for mask in (torch.ones(4, dtype=torch.bool), torch.ones(4, 5)):
        with pytest.raises(RuntimeError, match="mask should be of dtype bool and shape"):
            over_all(layer, [{"input": torch.ones(4, 3, 5), "mask": mask}])


def test_layers_without_running_statistics_can_be_looked_at_too():
    x = randn(4, 3)
    found = over_all(nn.BatchNorm1d(3, track_running_stats=False).double(), [x], by_batch=False)
    assert_right(found.layers[""], x)


def test_a_single_value_has_no_unbiased_variance():
    found = over_all(nn.BatchNorm1d(3), [torch.ones(1, 3)], by_batch=False).layers[""]
    assert found.var.tolist() == [0] * 3
    assert found.unbiased_var.isnan().all()


def test_ghost_batches_are_one_batch():
    x = randn(12, 3)
    found = over_all(normlab.BatchNorm1d(3, ghost_size=4).double(), [x]).layers[""]
    assert_right(found, x)


def test_empty_batches_are_not_counted():
    found = over_all(nn.BatchNorm1d(3), [torch.ones(0, 3), torch.ones(2, 3)])
    assert (found.layers[""].batches, found.batches) == (1, 2)


# ------------------------------------------------------------------------------ finiteness


def broken(value, at=2):
    batches = [randn(4, 3, seed=seed) for seed in range(4)]
    batches[at][1, 1] = value
    return batches


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_finite_guard_skips_what_is_not_finite(value):
    batches = broken(value)
    found = over_all(normlab.BatchNorm1d(3, finite_guard=True).double(), batches)
    assert_right(found.layers[""], *batches[:2], *batches[3:])
    assert (found.layers[""].batches, found.skipped, found.batches) == (3, {"": 1}, 4)
    with pytest.raises(InputError, match=r"^0: batch 3 has values there that are not finite: "):
        over_all(nn.Sequential(normlab.BatchNorm1d(3).double()), batches)


def test_a_batch_that_is_not_finite_in_one_call_is_skipped_whole():
    model = Twice()
    model.norm = normlab.BatchNorm1d(3, finite_guard=True).double()
    batches = [{"x": batch, "y": randn(4, 3)} for batch in broken(torch.nan)]
    found = over_all(model, batches)
    assert_right(found.layers["norm"], *[e for i in (0, 1, 3) for e in batches[i].values()])
    assert found.skipped == {"norm": 1}


# -------------------------------------------------------------------------------- stopping


def test_it_stops_when_the_means_are_known():
    batches = [randn(16, 3, seed=seed) for seed in range(40)]
    layer = nn.BatchNorm1d(3).double()

    def ratio(n):
        found = over_all(layer, batches[:n]).layers[""]
        return (found.standard_error / found.var.sqrt()).max().item()

    ratios = {n: ratio(n) for n in range(8, 41)}
    for tolerance in (ratios[20] * 1.0001, ratios[8] * 1.0001, 10.0):
        expected = next(n for n, each in ratios.items() if each <= tolerance)
        found = over_all(layer, iter(batches), tolerance=tolerance)
        assert (found.batches, found.settled) == (expected, True)
        assert found.layers[""].batches == expected
    found = over_all(layer, batches, tolerance=1e-9)
    assert (found.batches, found.settled) == (40, False)
    assert not over_all(layer, batches).settled


def test_a_constant_channel_stops_nobody_and_a_rare_layer_does():
    model = Twice()
    x = randn(16, 3)
    x[:, 1] = 0
    batches = [{"x": x, "y": x}] * 12
    assert over_all(model, batches, tolerance=0.1).batches == 8

    def forward(model, batch):
        model(**batch)
        if next(numbers) % 2:
            model.unused(x.float())

    numbers = iter(range(20))
    assert over_all(model, batches, tolerance=0.1, forward=forward).batches == 12


# -------------------------------------------------------------------------- as it was before


class Noisy(nn.Module):
    """Draws from every generator, counts in a buffer, puts another in a buffer's place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.last = x.mean().reshape(1)
        return x + torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002


def noisy():
    model = nn.Sequential(Noisy(), nn.BatchNorm1d(3), nn.Dropout(), nn.BatchNorm1d(3)).double()
    model[3].eval()
    model[1].momentum = 0.3
    return model


def visible(model):
    return {
        "state": [(name, id(each), each.tolist()) for name, each in model.named_buffers()],
        "modes": [each.training for each in model.modules()],
        "hooks": [len(each._forward_pre_hooks) for each in model.modules()],
        "momentum": model[1].momentum,
        "generators": (random.random(), np.random.rand(), torch.rand(()).item()),  # noqa: NPY002
        "gradients": torch.is_grad_enabled(),
    }


def seeded():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_all_is_afterwards_as_it_was(error):
    model = noisy()
    seeded()
    before = visible(model)
    seeded()

    def forward(model, batch):
        assert not torch.is_grad_enabled()
        assert [each.training for each in model] == [False, True, False, True]
        model(batch)
        if model[0].calls == 3 and error:
            raise error

    batches = [randn(4, 3)] * 4
    if error:
        with pytest.raises(error):
            over_all(model, batches, forward=forward)
    else:
        over_all(model, batches, forward=forward)
    assert visible(model) == before


def test_dropout_is_what_is_asked_for():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).double()
    x = 1 + randn(500, 3)
    assert_right(over_all(model, [x]).layers["1"], x)
    seeded()
    dropped = model[0](x)
    seeded()
    assert_right(over_all(model.eval(), [x], dropout=True).layers["1"], dropped)
    assert not model[0].training


def test_compiled_code_is_seen_too():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    compiled = torch.compile(model, backend="eager")
    x = randn(8, 3)
    compiled(x)
    before = copy.deepcopy(model.state_dict())
    assert_right(over_all(compiled, [x]).layers["_orig_mod.1"], model[0](x).detach())
    assert_close(model.state_dict(), before, rtol=0, atol=0)


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.BatchNorm1d(3), [], "expected at least one batch, got none"),
        (nn.BatchNorm1d(3), iter([]), "expected at least one batch, got none"),
        (nn.BatchNorm1d(3), torch.ones(4, 3), "such as a DataLoader, got a Tensor: put"),
        (
            nn.BatchNorm1d(3),
            {"x": torch.ones(4, 3)},
            "expected an iterable of batches, .* got a dict",
        ),
        (nn.BatchNorm1d(3), 3, "expected an iterable of batches, .* got a int"),
        (nn.BatchNorm1d(3), [3], "a batch is a int"),
        (
            nn.Sequential(nn.BatchNorm1d(3)),
            [torch.ones(4, 3), torch.ones(1, 3)],
            r"^0: batch 2 has one value per channel there, shape \(1, 3\), .* drop_last=True",
        ),
        (
            nn.BatchNorm1d(3),
            [torch.ones(4, 2)],
            r"^the model: batch 1 has shape \(4, 2\) there, expected \(N, 3, …\)",
        ),
        (nn.Sequential(nn.LazyBatchNorm1d()), [torch.ones(4, 3)], "0.weight has no shape yet: run"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_bad_input_is_one_line(model, batches, message):
    with pytest.raises(InputError, match=message):
        over_all(model, batches)


@pytest.mark.parametrize("tolerance", [0, -1.0, float("nan"), float("inf")])
def test_a_tolerance_is_positive(tolerance):
    with pytest.raises(InputError, match="expected a positive tolerance or None, got "):
        over_all(nn.BatchNorm1d(3), [torch.ones(4, 3)], tolerance=tolerance)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(4, 3, 2, 2), None])
def test_what_is_no_input_is_the_layers_to_refuse(bad):
    with pytest.raises((ValueError, AttributeError), match=r"expected 2D or 3D|'dim'"):
        over_all(nn.BatchNorm1d(3), [bad], forward=lambda model, batch: model(batch))


# ------------------------------------------------------------------------------ many ranks

SIZES = {
    "unequal": [[5, 3, 2], [6]],
    "one without": [[], [4, 4]],
    "one each": [[1, 1], [1, 1]],
    "none": [[], []],
}


def model_for_ranks():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), normlab.BatchNorm1d(4)
    ).double()


def batches_of(rank, case):
    return [rank + randn(n, 3, seed=10 * rank + i) for i, n in enumerate(SIZES[case][rank])]


def outcome(rank, case, model=None, as_iterator=False, forward=None):
    batches = batches_of(rank, case)
    called = []
    original = dist.all_gather_object
    dist.all_gather_object = lambda *a, **k: (called.append(1), original(*a, **k))[0]
    try:
        model, report = recalibrate(
            model or model_for_ranks(),
            iter(batches) if as_iterator else batches,
            process_group=dist.group.WORLD,
            forward=forward,
            inplace=True,
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        dist.all_gather_object = original
    return dict(model.state_dict()), report, len(called)


def failing(model, batch):
    model(batch)
    if dist.get_rank() == 1:
        raise OSError("broken")


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    alone = dist.new_group([0])
    seen = {case: outcome(rank, case) for case in SIZES if case != "one each"}
    seen["iterator"] = outcome(rank, "unequal", as_iterator=rank == 1)
    seen["failing"] = outcome(rank, "unequal", forward=failing)
    seen["wrapped"] = outcome(rank, "one without", DistributedDataParallel(model_for_ranks()))
    seen["shared"] = outcome(rank, "one each", normlab.SyncBatchNorm(3).double())
    if rank == 1:
        try:
            over_all(model_for_ranks(), batches_of(1, "unequal"), process_group=alone)
        except InputError as error:
            seen["outside"] = str(error)
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, "-W", "error", Path(__file__), folder], check=True, timeout=120)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", ["unequal", "one without", "iterator", "wrapped"])
def test_ranks_together_do_what_one_process_does_over_all_batches(ranks, case):
    sizes = {"iterator": "unequal", "wrapped": "one without"}.get(case, case)
    whole, expected = recalibrate(
        model_for_ranks(), [each for rank in range(2) for each in batches_of(rank, sizes)]
    )
    for state, report, calls in (rank[case] for rank in ranks):
        state = {name.removeprefix("module."): value for name, value in state.items()}
        assert_close(state, dict(whole.state_dict()), **EXACT)
        assert calls == (1 if case == "iterator" else 2)
        assert report.batches == expected.batches == sum(map(len, SIZES[sizes]))
        for name, layer in expected.layers.items():
            other = report.layers["module." * (case == "wrapped") + name]
            assert (other.batches, other.samples) == (layer.batches, layer.samples)
            assert_close(list(vars(other.before).values()), list(vars(layer.before).values()))
            if case == "iterator":
                assert other.after is None
            else:
                assert_close(list(vars(other.after).values()), list(vars(layer.after).values()))
    assert_close(ranks[0][case][0], ranks[1][case][0], rtol=0, atol=0)


def test_a_layer_that_shares_its_batch_may_have_one_sample_on_each_rank(ranks):
    data = torch.cat([each for rank in range(2) for each in batches_of(rank, "one each")])
    for state, report, _ in (rank["shared"] for rank in ranks):
        mean, var = truth(data)
        assert_close(state["running_mean"], mean, **EXACT)
        assert_close(state["running_var"], var * 4 / 3, **EXACT)
        assert report.layers[""].samples == 4


def test_what_fails_on_one_rank_fails_on_all(ranks):
    for rank in ranks:
        assert rank["none"].startswith("InputError: expected at least one batch, got none")
    assert ranks[0]["failing"] == (
        "InputError: rank 1 of the process group failed: OSError: broken"
    )
    assert ranks[1]["failing"] == "OSError: broken"
    assert ranks[1]["outside"] == "expected a process_group that this rank is part of"


if __name__ == "__main__":
    import torch._dynamo  # Data-parallel training would import it in every process: for seconds.

    start_processes(work, (sys.argv[1],), 2, start_method="fork")
