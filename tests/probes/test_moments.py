import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normlab
from normlab.probes import Moments, norm_moments, pooled


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen_by(layer, *calls, **named):
    with norm_moments({"norm": layer}) as seen:
        for call in calls:
            layer(call, **named)
    return seen["norm"]


def test_moments_are_those_of_each_call():
    x = randn(4, 3, 5)
    one, two = seen_by(nn.BatchNorm1d(3).double(), x, 2 * x)
    assert_close(one.mean, x.mean((0, 2)))
    assert_close(one.var, x.var((0, 2), correction=0))
    assert one.n == 20
    assert_close(two.mean, 2 * one.mean)
    assert_close(one.unbiased_var, x.transpose(0, 1).flatten(1).var(1))


@pytest.mark.parametrize("how", ["mask", "lengths"])
def test_padding_does_not_count(how):
    x, lengths = randn(2, 3, 5), torch.tensor([5, 2])
    x[1, :, 2:] = float("nan")
    mask = torch.arange(5) < lengths.view(-1, 1)
    named = {"mask": mask} if how == "mask" else {"lengths": lengths}
    (found,) = seen_by(normlab.BatchNorm1d(3).double(), x, **named)
    real = torch.cat([x[0], x[1, :, :2]], 1)
    assert_close(found.mean, real.mean(1))
    assert_close(found.var, real.var(1, correction=0))
    assert found.n == 7


def test_pooled_parts_are_the_whole_with_a_mean_large_against_the_deviation():
    x = 1e6 + 1e-3 * randn(102, 2)
    x[100:] += 1e-2
    parts = [
        Moments(part.mean(0), part.var(0, correction=0), float(len(part)))
        for part in x.split([100, 2])
    ]
    found = pooled(parts)
    assert found.n == 102
    assert_close(found.mean, x.mean(0), rtol=1e-15, atol=0)
    assert_close(found.var, (x - x.mean(0)).square().mean(0), rtol=1e-6, atol=0)


def test_hooks_are_gone_whatever_happens():
    layer = nn.BatchNorm1d(3)
    with pytest.raises(ZeroDivisionError), norm_moments({"": layer}):
        raise ZeroDivisionError
    assert not layer._forward_pre_hooks
