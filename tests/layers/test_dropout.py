import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normlab.layers import Dropout, draw_dropout_from


def drawing(seed, p=0.5):
    layer = Dropout(p)
    draw_dropout_from(torch.Generator().manual_seed(seed), layer)
    return layer


def test_a_seed_decides_the_masks():
    x = torch.ones(200)
    first, again, other = drawing(0), drawing(0), drawing(1)
    masks = [first(x), first(x)]
    assert_close([again(x), again(x)], masks, rtol=0, atol=0)
    assert not torch.equal(*masks)  # A generator moves on: each call has a mask of its own.
    assert not torch.equal(other(x), masks[0])


def test_the_global_rng_is_neither_read_nor_moved():
    x, masks = torch.ones(200), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        masks.append(drawing(7)(x))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*masks)


def test_evaluation_is_the_identity_and_draws_nothing():
    layer, x = drawing(0), torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert_close(layer.eval()(x), x, rtol=0, atol=0)
    assert_close(layer.train()(x), drawing(0)(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.75])
def test_kept_values_and_their_gradients_are_scaled_by_1_over_1_minus_p(p, dtype):
    n = 10_000
    x = torch.linspace(1, 2, n, dtype=dtype).requires_grad_()
    y = drawing(0, p)(x)
    y.sum().backward()
    kept = y != 0
    scale = torch.tensor(1 / (1 - p), dtype=dtype)
    assert y.dtype == dtype
    assert_close(y, torch.where(kept, x * scale, 0))
    assert_close(x.grad, torch.where(kept, scale, 0))
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * deviation


def test_p_0_keeps_all_and_p_1_keeps_nothing():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert_close(drawing(0, 0.0)(x), x, rtol=0, atol=0)
    y = drawing(0, 1.0)(x)
    y.sum().backward()
    assert_close(y, torch.zeros(50), rtol=0, atol=0)
    assert_close(x.grad, torch.zeros(50), rtol=0, atol=0)


def test_a_generator_reaches_every_dropout_however_deep_and_no_other_layer():
    inner, outer, stock = Dropout(0.5), Dropout(0.5), nn.Dropout(0.5)
    network = nn.Sequential(outer, nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), inner)}), stock)
    generator = torch.Generator()
    draw_dropout_from(generator, network)
    assert outer.generator is generator
    assert inner.generator is generator
    assert not hasattr(stock, "generator")
    assert Dropout(0.5).generator is None


def test_it_is_a_torch_dropout_without_state():
    layer = drawing(0, 0.3)
    assert isinstance(layer, nn.Dropout)
    assert repr(layer) == repr(nn.Dropout(0.3))
    assert layer.state_dict() == {}
