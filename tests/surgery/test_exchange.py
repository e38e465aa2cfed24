import pytest
import torch
from torch import nn

import normlab
from normlab.errors import InputError
from normlab.layers import RMSNorm
from normlab.surgery import exchange_norms

EXAMPLE = torch.zeros(2, 3, 8, 8)


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4, eps=0.1, momentum=0.3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 10),
    )


@pytest.mark.parametrize(
    ("norm", "kinds"),
    [
        (None, (nn.Identity, nn.Identity)),
        ("batch", (normlab.BatchNorm2d, normlab.BatchNorm1d)),
        ("torch-batch", (nn.BatchNorm2d, nn.BatchNorm1d)),
        ("layer", (nn.GroupNorm, nn.LayerNorm)),
        ("group:2", (nn.GroupNorm, nn.GroupNorm)),
        ("rms", (RMSNorm, RMSNorm)),
    ],
)
def test_norms_take_each_others_places(norm, kinds):
    exchanged = model()
    assert exchange_norms(exchanged, norm, EXAMPLE) == ["1", "5"]
    assert (type(exchanged[1]), type(exchanged[5])) == kinds
    assert exchanged(EXAMPLE).shape == (2, 10)
    assert exchanged[0].weight.equal(model()[0].weight)


def test_a_batch_norm_keeps_its_options_and_every_norm_its_weights():
    exchanged = model()
    with torch.no_grad():
        exchanged[1].weight.zero_()  # As the last norm of a residual block is begun.
        exchanged[1].bias.fill_(2)
    exchange_norms(exchanged, "batch", EXAMPLE)
    assert (exchanged[1].eps, exchanged[1].momentum) == (0.1, 0.3)
    assert exchanged[1].weight.tolist() == [0] * 4
    exchange_norms(exchanged, "group:2", EXAMPLE)
    assert exchanged[1].weight.tolist() == [0] * 4
    assert exchanged[1].bias.tolist() == [2] * 4
    assert exchanged[1].eps == 1e-5  # Group norm's own.


def test_what_was_exchanged_is_not_remembered():
    exchanged = model()
    exchange_norms(exchanged, "group:2", EXAMPLE)
    _, report = normlab.convert(exchanged, "batch")
    assert set(report.skipped) == {"1", "5"}  # They never were batch norms, as far as is known.


def test_an_affineless_batch_norm_stays_so():
    exchanged = nn.Sequential(nn.BatchNorm2d(3, affine=False, track_running_stats=False))
    exchange_norms(exchanged, "batch", EXAMPLE)
    assert exchanged[0].weight is None
    assert exchanged[0].running_mean is None


class Twice(nn.Module):
    """Has one norm under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


def test_a_shared_norm_stays_shared_and_modes_and_hooks_are_as_before():
    shared = Twice().train()
    shared.first.eval()
    exchange_norms(shared, "group:3", EXAMPLE)
    assert isinstance(shared.first, nn.GroupNorm)
    assert shared.first is shared.second
    assert shared.training
    assert not shared.first.training
    whole = model()
    exchange_norms(whole, None, EXAMPLE)
    assert all(each.training and not each._forward_pre_hooks for each in whole.modules())


class Active(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("layers", "norm", "message"),
    [
        ([nn.Flatten()], "group:8", "the network has no norm layer that group:8 could take"),
        ([nn.BatchNorm2d(3)], "group:2", "0: group:2 does not divide a layer of 3 channels"),
        ([Active(3)], "group:3", "0: Active may do more than normalize"),
        ([Active(3)], None, "0: Active may do more than normalize"),
        ([Unused()], "batch", "0.norm: BatchNorm2d is not called"),
        ([nn.LayerNorm(8)], "batch", r"0: LayerNorm normalizes the last axes of \(2, 3, 8, 8\)"),
        ([nn.Flatten(), nn.LayerNorm(192)], "instance", "1: LayerNorm gets one value per channel"),
    ],
    ids=str,
)
def test_what_cannot_be_exchanged_is_named(layers, norm, message):
    with pytest.raises(InputError, match=message):
        exchange_norms(nn.Sequential(*layers), norm, EXAMPLE)


def test_a_norm_alone_cannot_be_exchanged():
    with pytest.raises(InputError, match="the network is a norm layer itself"):
        exchange_norms(nn.BatchNorm2d(3), "batch", EXAMPLE)


def test_a_layer_norm_over_whole_samples_can_be_exchanged():
    exchanged = nn.Sequential(nn.LayerNorm([3, 8, 8]))
    exchange_norms(exchanged, "batch", EXAMPLE)
    assert exchanged[0].weight.shape == (3,)


def test_a_model_that_is_refused_is_left_as_it_was():
    refused = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(InputError, match="2: group:3 does not divide a layer of 4 channels"):
        exchange_norms(refused, "group:3", EXAMPLE)
    assert isinstance(refused[0], nn.BatchNorm2d)


def test_types_statistics_and_what_is_frozen_are_kept():
    exchanged = nn.Sequential(nn.BatchNorm2d(3)).double()
    exchanged[0].running_mean.fill_(5)
    exchanged[0].weight.requires_grad_(False)
    exchange_norms(exchanged, "batch", EXAMPLE.double())
    assert exchanged[0].running_mean.tolist() == [5] * 3
    assert exchanged[0].running_mean.dtype == exchanged[0].weight.dtype == torch.float64
    assert not exchanged[0].weight.requires_grad
    assert exchanged[0].bias.requires_grad


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(input=x)


def test_a_norm_that_is_called_by_keyword_is_seen():
    exchanged = Named()
    assert exchange_norms(exchanged, "group:3", EXAMPLE) == ["norm"]
