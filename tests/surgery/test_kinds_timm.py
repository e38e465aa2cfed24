"""Conversions of networks as they are in use, where timm is installed."""

import pytest
import torch
from torch.testing import assert_close

from normlab.surgery import convert

timm = pytest.importorskip("timm")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "regnetx_002"])
@pytest.mark.parametrize("kind", ["group:4", "layer", "none"])
def test_there_and_back(name, kind):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    batch, _ = convert(model)
    there, _ = convert(batch, kind, example=x)
    back, _ = convert(there, "batch")
    with torch.no_grad():
        assert back(x).equal(batch(x))
        assert_close(batch(x), model(x), rtol=1e-3, atol=1e-4)
    state = batch.state_dict()
    assert list(back.state_dict()) == list(state)
    assert all(value.equal(state[name]) for name, value in back.state_dict().items())
