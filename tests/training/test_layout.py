import pytest

from normlab.networks import build_network
from normlab.training import layout


@pytest.mark.parametrize(
    ("arm", "built", "expected"),
    [
        *(("plain", built, True) for built in (True, False)),
        *(("batch", built, built) for built in (True, False)),
        *(("torch-batch", built, False) for built in (True, False)),
        ("group:2", True, False),
        ("layer", True, False),
        ("instance", True, True),
    ],
)
def test_channels_are_last_where_norms_are_as_exact(monkeypatch, arm, built, expected):
    monkeypatch.setattr(layout, "BUILT", built)
    network = build_network("lenet", arm, 0, image_shape=(1, 28, 28), classes=10)
    assert layout.may_have_channels_last(network) == expected
