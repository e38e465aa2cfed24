import copy
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import normlab
from normlab import SyncBatchNorm

EXACT = {"rtol": 1e-10, "atol": 1e-10}
FLOAT = {"rtol": 1e-4, "atol": 1e-4}
# Samples on each rank.
UNEQUAL = {2: [5, 2], 4: [3, 1, 0, 5]}
EMPTY = {2: [0, 6], 4: [0, 4, 0, 0]}
COLLECTIVES = [
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all"),
    *("all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "isend"),
    *("recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send"),
]
ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.2),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


class Case(NamedTuple):
    spatial: tuple[int, ...] = ()
    options: dict = MappingProxyType({})
    residual: bool = False
    masked: bool = False
    counts: dict = UNEQUAL


CASES = {
    "(N, C)": Case(),
    "(N, C, L)": Case((4,)),
    "(N, C, H, W)": Case((3, 2)),
    "an empty rank": Case((2,), counts=EMPTY),
    "a mask": Case((4,), masked=True),
    "a mask over (N, C)": Case(masked=True),
    "a mask and an empty rank": Case((3, 2), masked=True, counts=EMPTY),
    "a residual": Case((3, 2), residual=True),
    "a residual and relu": Case((3, 2), {"activation": "relu"}, residual=True),
    "a residual and silu": Case((4,), {"activation": "silu"}, residual=True),
    "leaky_relu": Case((4,), {"activation": "leaky_relu", "negative_slope": 0.2}),
    "sigmoid": Case((), {"activation": "sigmoid"}),
    "everything": Case((4,), {"activation": "relu", "finite_guard": True}, True, True),
    "momentum None": Case((4,), {"momentum": None}),
    "momentum None and a mask": Case((4,), {"momentum": None}, masked=True),
    "finite_guard": Case((4,), {"finite_guard": True}),
    "update_once": Case((4,), {"update_once": True}),
    "no affine": Case((4,), {"affine": False}),
    "no bias": Case((4,), {"bias": False}),
    "no tracking": Case((4,), {"track_running_stats": False}),
}
STEPS = 2


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_for(options, dtype=torch.float64, constructor=SyncBatchNorm):
    layer = constructor(3, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(0.5, 2, 3))
    return layer


def whole_batch(case, counts, step):
    """Input, cotangent, residual and mask of all ranks together, the same in every process."""
    shape = (sum(counts), 3, *case.spatial)
    x = 3 + 2 * randn(*shape, seed=10 + step)
    mask = torch.rand(shape[0], *case.spatial, generator=torch.Generator().manual_seed(step)) < 0.6
    return {
        "x": x,
        "cotangent": randn(*shape, seed=20 + step),
        "residual": randn(*shape, seed=30 + step) if case.residual else None,
        "mask": mask if case.masked else None,
    }


# ------------------------------------------------------------------ what every process does


def gradients(layer, x, cotangent, residual=None, mask=None):
    x = x.clone().requires_grad_()
    residual = residual if residual is None else residual.clone().requires_grad_()
    y = layer(x, residual, mask=mask)
    y.backward(cotangent)
    seen = {"output": y.detach(), "grad_input": x.grad}
    return seen if residual is None else {**seen, "grad_residual": residual.grad}


def shared_outcome(case, counts, rank, group=None):
    layer = layer_for({**case.options, "process_group": group})
    steps = []
    for step in range(STEPS):
        batch = whole_batch(case, counts, step)
        mine = {k: v if v is None else v.split(counts)[rank] for k, v in batch.items()}
        steps.append(gradients(layer, **mine))
    return {
        "steps": steps,
        "grads": {name: parameter.grad for name, parameter in layer.named_parameters()},
        "buffers": dict(layer.named_buffers()),
    }


def message_of(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def counted_collectives(function):
    """Call a function; return what it returned and the names of the collectives it called."""
    called, originals = [], {name: getattr(dist, name) for name in COLLECTIVES}

    def recording(name):
        def call(*arguments, **keywords):
            called.append(name)
            return originals[name](*arguments, **keywords)

        return call

    try:
        for name in COLLECTIVES:
            setattr(dist, name, recording(name))
        return function(), called
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def collectives(rank):
    x = randn(4, 3, seed=rank).requires_grad_()
    layer = layer_for({"finite_guard": True})
    y, forward = counted_collectives(lambda: layer(x, mask=torch.tensor([True] * 3 + [False])))
    _, backward = counted_collectives(y.square().sum().backward)
    layer.eval()
    _, evaluation = counted_collectives(lambda: layer(x).sum().backward())
    stateless = layer_for({"track_running_stats": False}).eval()
    _, without_statistics = counted_collectives(lambda: stateless(x).sum().backward())
    return {
        "forward": forward,
        "backward": backward,
        "evaluation": evaluation,
        "evaluation without running statistics": without_statistics,
    }


def guarded(rank):
    """One rank alone holds a value that is not finite."""
    seen = {}
    for name, bad in (("nan", torch.nan), ("inf", torch.inf)):
        layer = layer_for({"finite_guard": True})
        layer(randn(4, 3, seed=rank))
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        layer(torch.full((2, 3), bad if rank == 1 else 1.0, dtype=torch.float64))
        seen[name] = before, dict(layer.state_dict()), layer.num_batches_skipped
    return seen


def far_from_zero(rank, dtype):
    layer = layer_for({"eps": 1e-12 if dtype == torch.float32 else 1e-5}, torch.float32)
    mean, deviation = (1e4, 1e-2) if dtype == torch.float32 else (300, 20)
    x = (mean + deviation * randn(500, 3, seed=rank)).to(dtype)
    return {"x": x, **gradients(layer, x, randn(500, 3, seed=10 + rank).to(dtype))}


def data_parallel(rank, counts):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3), nn.Linear(3, 1)).double()
    try:
        network = DistributedDataParallel(network)
    except ValueError as error:
        return str(error)
    batch = whole_batch(Case(), counts, 0)
    for _ in range(2):  # A second forward pass before the backward pass: buffers are broadcast.
        y = network(batch["x"].split(counts)[rank])
    y.square().sum().backward()
    return {name: parameter.grad for name, parameter in network.module.named_parameters()}


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )
    groups = [dist.new_group(ranks) for ranks in halves(world)]
    group, counts = groups[rank % 2], [UNEQUAL[world][other] for other in halves(world)[rank % 2]]
    one_value = [int(other == 1) for other in range(world)]
    nothing = torch.zeros(0, 3, dtype=torch.float64)
    masked_out = layer_for({})
    seen = {
        "cases": {name: shared_outcome(c, c.counts[world], rank) for name, c in CASES.items()},
        "half of the ranks": shared_outcome(Case((4,)), counts, rank // 2, group),
        "torch": message_of(nn.SyncBatchNorm(3), torch.ones(4, 3)),
        "one value": message_of(SyncBatchNorm(3), torch.ones(one_value[rank], 3)),
        "one value in each": message_of(SyncBatchNorm(3), torch.ones(1, 3)),
        "wrong channels": message_of(SyncBatchNorm(3), torch.ones(4, 1)),
        "wrong rank": message_of(SyncBatchNorm(3), torch.ones(3)),
        "wrong eps": message_of(SyncBatchNorm(3, eps=-1.0), torch.ones(4, 3)),
        "nothing": gradients(layer_for({}), nothing, nothing),
        "masked out": gradients(
            masked_out,
            randn(2, 3),
            torch.ones(2, 3).double(),
            mask=torch.zeros(2, dtype=torch.bool),
        ),
        "masked out buffers": dict(masked_out.named_buffers()),
        "collectives": collectives(rank),
        "guarded": guarded(rank),
        "float32": far_from_zero(rank, torch.float32),
        "bfloat16": far_from_zero(rank, torch.bfloat16),
        "data parallel": data_parallel(rank, UNEQUAL[world]),
    }
    torch.save(seen, Path(folder, f"{world}-{rank}.pt"))
    dist.destroy_process_group()


def halves(world):
    return [list(range(start, world, 2)) for start in range(2)]


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """What each process of each group saw: processes are started once, for all that needs them."""
    folder = tmp_path_factory.mktemp("groups")
    # A script of its own, which imports once and then forks, before torch has started any thread.
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return {
        world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
        for world in UNEQUAL
    }


@pytest.fixture(params=UNEQUAL, ids="{} processes".format)
def ranks(request, groups):
    return groups[request.param]


# ----------------------------------------------------------------------- what they should see


def formula(x, residual, mask, weight, bias, eps, activation):
    """Return the output, the mean and the unbiased variance, by operations that autograd knows."""
    last = x.movedim(1, -1)
    real = last.flatten(0, -2) if mask is None else last[mask]
    mean, var = real.mean(0), real.var(0, correction=0)
    z = ((last - mean) / (var + eps).sqrt() * weight + bias).movedim(-1, 1)
    z = z if residual is None else z + residual
    return ACTIVATIONS[activation](z), mean.detach(), real.detach().var(0)


def outcome_of_one_process(case, counts):
    """Do what the ranks do together, over the whole batch."""
    weight, bias = torch.linspace(0.5, 2, 3, dtype=torch.float64).repeat(2, 1)
    affine = case.options.get("affine", True)
    weight = (weight if affine else torch.ones_like(weight)).requires_grad_()
    bias = bias if affine and case.options.get("bias", True) else torch.zeros_like(bias)
    bias.requires_grad_()
    running = [torch.zeros(3).double(), torch.ones(3).double()]
    steps = []
    for step in range(STEPS):
        batch = whole_batch(case, counts, step)
        x = batch["x"].requires_grad_()
        residual = batch["residual"] if batch["residual"] is None else batch["residual"].clone()
        if residual is not None:
            residual.requires_grad_()
        activation = case.options.get("activation")
        y, *statistics = formula(x, residual, batch["mask"], weight, bias, 1e-5, activation)
        y.backward(batch["cotangent"])
        steps.append({"output": y.detach(), "grad_input": x.grad})
        if residual is not None:
            steps[-1]["grad_residual"] = residual.grad
        momentum = case.options.get("momentum", 0.1) or 1 / (step + 1)
        running = [
            (1 - momentum) * old + momentum * new
            for old, new in zip(running, statistics, strict=True)
        ]
    return steps, {"weight": weight.grad, "bias": bias.grad}, running


def assert_shares_make_the_whole(shares, case, counts):
    steps, grads, (running_mean, running_var) = outcome_of_one_process(case, counts)
    for step, expected in enumerate(steps):
        parts = [share["steps"][step] for share in shares]
        assert [len(part["output"]) for part in parts] == counts
        actual = {key: torch.cat([part[key] for part in parts]) for key in expected}
        assert_close(actual, expected, **EXACT)
    for name in shares[0]["grads"]:
        assert_close(sum(share["grads"][name] for share in shares), grads[name], **EXACT)
    for share in shares:
        buffers = share["buffers"]
        assert_close(buffers, shares[0]["buffers"], rtol=0, atol=0)
        if buffers:
            assert_close(buffers["running_mean"], running_mean, **EXACT)
            assert_close(buffers["running_var"], running_var, **EXACT)
            assert buffers["num_batches_tracked"].item() == STEPS


@pytest.mark.parametrize("name", CASES)
def test_the_ranks_together_do_what_one_process_does_over_the_whole_batch(ranks, name):
    case = CASES[name]
    shares = [rank["cases"][name] for rank in ranks]
    assert_shares_make_the_whole(shares, case, case.counts[len(ranks)])
    optional = {"affine": ["weight", "bias"], "bias": ["bias"]}
    absent = {n for o, names in optional.items() if case.options.get(o) is False for n in names}
    assert set(shares[0]["grads"]) == {"weight", "bias"} - absent
    assert bool(shares[0]["buffers"]) == case.options.get("track_running_stats", True)


@pytest.mark.parametrize("half", [0, 1])
def test_a_group_shares_among_its_own_ranks_alone(ranks, half):
    members = halves(len(ranks))[half]
    counts = [UNEQUAL[len(ranks)][rank] for rank in members]
    shares = [ranks[rank]["half of the ranks"] for rank in members]
    assert_shares_make_the_whole(shares, Case((4,)), counts)


def test_torchs_layer_refuses_tensors_on_a_cpu(ranks):
    for rank in ranks:
        assert rank["torch"].startswith("ValueError: SyncBatchNorm expected input tensor to be on")


def test_there_is_one_collective_each_way_and_none_in_evaluation(ranks):
    for rank in ranks:
        assert len(rank["collectives"]["forward"]) == 1
        assert len(rank["collectives"]["backward"]) == 1
        assert rank["collectives"]["evaluation"] == []
        # As in torch: one rank alone may evaluate.
        assert rank["collectives"]["evaluation without running statistics"] == []


def test_a_single_value_in_all_is_refused_on_every_rank(ranks):
    for rank in ranks:
        assert rank["one value"].startswith("ValueError: Expected more than 1 value per channel")
        assert "over all ranks" in rank["one value"]
        assert "SyncBatchNorm(3)" in rank["one value"]
        assert rank["one value in each"] == "no error"


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        ("wrong channels", "RuntimeError: running_mean should contain 1 elements"),
        ("wrong rank", "ValueError: "),
        ("wrong eps", "ValueError: batch_norm eps must be positive during training"),
    ],
)
def test_bad_input_is_refused_on_every_rank_as_a_plain_layer_does(ranks, mistake, expected):
    for rank in ranks:
        assert rank[mistake].startswith(expected)
        assert "SyncBatchNorm(3)" in rank[mistake]


def test_where_no_rank_has_a_real_value_the_statistics_stay(ranks):
    for rank in ranks:
        assert rank["nothing"]["output"].shape == rank["nothing"]["grad_input"].shape == (0, 3)
        assert rank["masked out"]["output"].isfinite().all()
        assert rank["masked out"]["grad_input"].isfinite().all()
        buffers = rank["masked out buffers"]
        assert_close(buffers["running_mean"], torch.zeros(3).double(), rtol=0, atol=0)
        assert_close(buffers["running_var"], torch.ones(3).double(), rtol=0, atol=0)
        assert buffers["num_batches_tracked"].item() == 0


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_value_on_one_rank_that_is_not_finite_is_skipped_by_all(ranks, bad):
    for rank in ranks:
        before, after, skipped = rank["guarded"][bad]
        assert_close(after, before, rtol=0, atol=0)
        assert after["num_batches_tracked"].item() == 1
        assert skipped.item() == 1


def test_float32_survives_a_mean_far_above_the_deviation(ranks):
    x = torch.cat([rank["float32"]["x"] for rank in ranks])
    cotangent = torch.cat([randn(500, 3, seed=10 + rank) for rank in range(len(ranks))])
    whole = layer_for({"eps": 1e-12})
    expected = gradients(whole, x.double(), cotangent.float().double())
    for name, scale in (("output", 1), ("grad_input", 100)):  # Over the deviation, 0.01.
        actual = torch.cat([rank["float32"][name] for rank in ranks])
        assert_close(actual.double() / scale, expected[name] / scale, **FLOAT)


def test_bfloat16_is_computed_in_float32_and_returned_in_bfloat16(ranks):
    x = torch.cat([rank["bfloat16"]["x"] for rank in ranks])
    cotangent = torch.cat([randn(500, 3, seed=10 + rank) for rank in range(len(ranks))])
    whole = layer_for({}, torch.float32)
    expected = gradients(whole, x.float(), cotangent.bfloat16().float())
    for name in expected:
        actual = torch.cat([rank["bfloat16"][name] for rank in ranks])
        assert actual.dtype == torch.bfloat16
        assert_close(actual, expected[name].bfloat16(), rtol=2**-7, atol=1e-5)


def test_data_parallel_training_gives_the_gradients_of_one_process(ranks):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    batch = whole_batch(Case(), UNEQUAL[len(ranks)], 0)
    network(batch["x"]).square().sum().backward()
    for rank in ranks:
        assert isinstance(rank["data parallel"], dict), rank["data parallel"]
        for name, parameter in network.named_parameters():
            # Data-parallel training takes the mean over ranks.
            assert_close(rank["data parallel"][name] * len(ranks), parameter.grad, **EXACT)


# -------------------------------------------------------------------------- without a group


@pytest.mark.parametrize("spatial", [(), (4,), (3, 2)])
def test_without_a_process_group_it_is_a_plain_layer(spatial):
    plain = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[len(spatial)]
    ours, theirs = (
        layer_for({}, constructor=constructor) for constructor in (SyncBatchNorm, plain)
    )
    for training in (True, True, False):
        seen = []
        for layer in (ours.train(training), theirs.train(training)):
            x = (3 + randn(5, 3, *spatial)).requires_grad_()
            y = layer(x)
            y.backward(randn(5, 3, *spatial, seed=1))
            seen.append([y, x.grad, layer.weight.grad, layer.bias.grad, layer.state_dict()])
        assert_close(*map(list, zip(*([a, b] for a, b in [seen]), strict=True)), **EXACT)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel.*SyncBatchNorm"):
        ours.train()(torch.ones(1, 3).double())


def network_to_convert():
    network = nn.Sequential()
    network.add_module("stem", nn.Conv2d(2, 3, 1))
    network.add_module("theirs", nn.BatchNorm2d(3, eps=1e-3, momentum=None))
    network.add_module("block", nn.Sequential(normlab.BatchNorm2d(3, **OPTIONS), nn.ReLU()))
    network.add_module("frozen", nn.BatchNorm2d(3, affine=False).eval())
    network.add_module("stateless", nn.BatchNorm2d(3, track_running_stats=False, bias=False))
    network.block[0].name = "block.0"
    network(randn(4, 2, 3, 3, dtype=torch.float32))
    return network


OPTIONS = {
    "momentum": 0.3,
    "activation": "leaky_relu",
    "negative_slope": 0.2,
    "finite_guard": True,
    "update_once": True,
    "float32_statistics": True,
}


def test_a_converted_network_keeps_all_it_had():
    network = network_to_convert()
    before = copy.deepcopy(network)
    parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    converted = SyncBatchNorm.convert_sync_batchnorm(network)
    assert converted is network
    assert [name for name, _ in converted.named_modules()] == [n for n, _ in before.named_modules()]
    layers = [(network.get_submodule(name), old) for name, old in before.named_modules()]
    norms = [(new, old) for new, old in layers if isinstance(old, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 4
    for new, old in norms:
        assert type(new) is SyncBatchNorm
        # The options are part of what is printed.
        assert repr(new).removeprefix("SyncBatchNorm") == repr(old).removeprefix(type(old).__name__)
        assert new.training == old.training
        assert getattr(new, "name", "") == getattr(old, "name", "")
    assert network.block[0].negative_slope == 0.2
    assert list(dict(network.named_parameters())) == list(parameters)
    assert all(p is parameters[name] for name, p in network.named_parameters())
    assert list(dict(network.named_buffers())) == list(buffers)
    assert all(b is buffers[name] for name, b in network.named_buffers())
    x = randn(4, 2, 3, 3, seed=1, dtype=torch.float32)
    assert_close(network(x), before(x))


@pytest.mark.parametrize("constructor", [nn.BatchNorm2d, normlab.BatchNorm2d, nn.SyncBatchNorm])
def test_a_layer_converted_by_itself_is_a_new_layer(constructor):
    layer = constructor(3)
    converted = SyncBatchNorm.convert_sync_batchnorm(layer, process_group="group")
    assert converted is not layer
    assert type(converted) is SyncBatchNorm
    assert converted.weight is layer.weight
    assert converted.process_group == "group"
    assert type(layer) is constructor


def test_a_module_without_batch_norm_stays_as_it_is():
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    modules = list(network.modules())
    assert SyncBatchNorm.convert_sync_batchnorm(network) is network
    assert list(network.modules()) == modules


if __name__ == "__main__":
    import torch._dynamo  # Data-parallel training would import it in every process: for seconds.

    started = [
        start_processes(work, (world, sys.argv[1]), world, join=False, start_method="fork")
        for world in UNEQUAL
    ]
    for processes in started:
        while not processes.join():
            pass
