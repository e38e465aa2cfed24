import copy

import pytest
import torch
from torch import fx, nn

from normlab import BatchNorm1d, BatchNorm2d
from normlab.data import load
from normlab.kernels import BUILT
from normlab.training import Recipe, Setting, lowering, optimizers, program
from normlab.training.steps import NotLoweredError

pytestmark = pytest.mark.skipif(not BUILT, reason="the kernels are not built")


@pytest.fixture(scope="module")
def data():
    return load("mnist").images[:200], load("mnist").labels[:200]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(784, 6), nn.Linear(6, 6), nn.Linear(6, 10)

    def forward(self, x):
        x = self.first(x.flatten(1))
        return self.last(x + torch.tanh(self.inner(x)) * x)


class Function(nn.Module):
    def __init__(self, function, size=12):
        super().__init__()
        self.function = function
        self.register_buffer("kept", torch.zeros(size))
        self.register_buffer("counter", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.function(self, x)


def kept(value, size=12):
    """A layer that does nothing but keep a value in its buffer."""

    def function(self, x):
        self.kept.copy_(value(self, x))
        return x

    return Function(function, size)


def mlp(*layers):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 12), *layers, nn.Linear(12, 10))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # No scale is 1 and no shift is 0.
    return network


def images(*layers, features=96):
    """A network whose layers get images of four channels, 7×9."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 252), nn.Unflatten(1, (4, 7, 9)), *layers)
    network.extend([nn.Flatten(), nn.Linear(features, 10)])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def arguments(network, data, batch):
    state = [each.detach() for each in (*network.parameters(), *network.buffers())]
    return [*data, *(each.clone() for each in state), batch]


def both(network, data, scaling="0..1", size=32):
    """What the module and the kernels return for a batch, and what they make of the buffers."""
    results = []
    for code in ("eager", "native"):
        batch = torch.arange(7, 7 + size)
        tensors = arguments(network.train(), data, batch)
        run = program.make(copy.deepcopy(network), 1, scaling, tensors, code)
        results.append([*run(tensors), *tensors])
    return results


NETWORKS = {
    "relu": lambda: mlp(nn.ReLU()),
    "leaky relu": lambda: mlp(nn.LeakyReLU(0.2)),
    "leaky relu, usual slope": lambda: mlp(nn.LeakyReLU()),
    "sigmoid": lambda: mlp(nn.Sigmoid()),
    "tanh": lambda: mlp(nn.Tanh()),
    "silu": lambda: mlp(nn.SiLU()),
    "batch norm": lambda: mlp(BatchNorm1d(12)),
    "stock batch norm": lambda: mlp(nn.BatchNorm1d(12, momentum=0.3, eps=0.1)),
    "batch norm, no affine": lambda: mlp(BatchNorm1d(12, affine=False)),
    "batch norm, no statistics": lambda: mlp(BatchNorm1d(12, track_running_stats=False)),
    "layer norm": lambda: mlp(nn.LayerNorm(12, eps=0.1)),
    "layer norm, no affine": lambda: mlp(nn.LayerNorm(12, elementwise_affine=False)),
    "group norm": lambda: mlp(nn.GroupNorm(3, 12)),
    "group norm, no affine": lambda: mlp(nn.GroupNorm(3, 12, affine=False)),
    "no bias": lambda: mlp(nn.Linear(12, 12, bias=False)),
    "residual": Residual,
    "a sum of all": lambda: mlp(kept(lambda _, x: x.sum(), size=())),
    "rows of another shape": lambda: mlp(
        kept(lambda _, x: x.sum(0).view(3, 4).unbind()[1], size=4)
    ),
    "channels of runs": lambda: mlp(
        nn.Unflatten(1, (3, 4)), nn.BatchNorm1d(3), nn.GroupNorm(3, 3), nn.Flatten()
    ),
    "norm of parts": lambda: mlp(nn.Unflatten(1, (3, 4)), nn.LayerNorm(4), nn.Flatten()),
    "convolution": lambda: images(nn.Conv2d(4, 3, (2, 5)), features=90),
    "convolutions with rims": lambda: images(
        nn.Conv2d(4, 7, (3, 5), padding=(2, 1)),
        nn.Tanh(),
        nn.Conv2d(7, 2, 3, padding="same", bias=False),
        features=126,
    ),
    "average pooling": lambda: images(nn.AvgPool2d((3, 2)), features=32),
    "max pooling": lambda: images(nn.MaxPool2d(2), features=48),
    "convolution and batch norm": lambda: images(
        nn.Conv2d(4, 6, 3), BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d((5, 1)), features=42
    ),
    "stock batch norm of images": lambda: images(nn.BatchNorm2d(4), features=252),
    "group norm of images": lambda: images(nn.GroupNorm(2, 4), features=252),
    "group norm of images, no affine": lambda: images(
        nn.GroupNorm(2, 4, affine=False), features=252
    ),
    "layer norm of images": lambda: images(nn.LayerNorm([4, 7, 9]), features=252),
    "lerp": lambda: mlp(kept(lambda self, x: torch.lerp(self.kept, x.sum(0), 0.3))),
}


@pytest.mark.parametrize("scaling", ["0..1", "-1..1"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_kernels_do_what_the_module_does(data, name, scaling):
    network = NETWORKS[name]()
    expected, found = both(network.double(), data, scaling)
    assert len(expected) == len(found)
    # Images are scaled in float32 in any case, and there a fused product and sum round once.
    tolerance = 1e-11 if scaling == "0..1" else 1e-6
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    expected, found = both(network.float(), data, scaling)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "sigmoid", "silu"])
def test_batch_norm_of_large_layers_and_its_activation(data, activation):
    torch.manual_seed(0)  # 32 x 1024 values are worth normlab's own operator.
    norm = BatchNorm1d(1024, activation=activation, momentum=0.9)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 1024), norm, nn.Linear(1024, 10))
    expected, found = both(network, data)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6)


def test_the_results_are_the_callers_own(data):
    network = mlp(nn.ReLU())
    tensors = arguments(network, data, torch.arange(8))
    run = program.make(network, 1, "0..1", tensors, "native")
    first = run(tensors)
    kept = [each.clone() for each in first]
    run([*tensors[:-1], torch.arange(8, 16)])
    assert all(a.equal(b) for a, b in zip(first, kept, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.02])
@pytest.mark.parametrize(
    "fields",
    [{"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adam"}],
    ids=str,
)
def test_steps_move_parameters_as_torch_optim_does(data, fields, decay):
    recipe = Recipe(**fields)
    network = mlp(nn.Tanh()).double()
    batches = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:128].view(4, 32)
    stacked = [each.detach().clone().unsqueeze(0) for each in network.parameters()]
    optimizer = optimizers.make(recipe, stacked, [Setting(0.05, decay)])
    state = [*data, *(each[0] for each in stacked)]
    run = program.make(network, 1, "0..1", [*state, batches[0]], "native")
    spans = [run.train(state, [span], optimizer, 0) for span in (batches[:3], batches[3:])]
    total, hits = (sum(each) for each in zip(*spans, strict=True))
    more = {"momentum": recipe.momentum} if recipe.optimizer == "sgd" else {}
    kind = torch.optim.SGD if recipe.optimizer == "sgd" else torch.optim.Adam
    reference = kind(network.parameters(), 0.05, weight_decay=decay, foreach=False, **more)
    expected, right = 0.0, 0
    for batch in batches:
        x = (data[0][batch].float() * (1 / 255)).double()
        logits = network(x)
        loss = nn.functional.cross_entropy(logits, data[1][batch])
        reference.zero_grad()
        loss.backward()
        reference.step()
        expected += loss.item()
        right += (logits.argmax(1) == data[1][batch]).sum().item()
    assert hits == right > 0
    assert total == pytest.approx(expected, rel=1e-12)
    assert optimizer.steps.tolist() == [4.0]
    for ours, theirs in zip(stacked, network.parameters(), strict=True):
        torch.testing.assert_close(ours[0], theirs.detach(), rtol=1e-11, atol=1e-13)


class Table(nn.Module):
    """Adds rows of its own, found by an index of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.ones(4, 12, dtype=torch.uint8))
        self.register_buffer("index", torch.full((32,), -1))

    def forward(self, x):
        return x + self.rows[self.index].float()


def counted(self, x):
    self.counter.add_(1, alpha=5)
    return x


def on_images(layer, features):
    """The layer, given three channels, 2×2, and what brings what it makes of them to twelve."""
    return nn.Sequential(nn.Unflatten(1, (3, 2, 2)), layer, nn.Flatten(), nn.Linear(features, 12))


REFUSED = {
    "gelu": (nn.GELU(), "no kernel for aten.gelu"),
    "relu6": (nn.ReLU6(), "no kernel for aten.hardtanh"),
    "broadcast rows": (Function(lambda _, x: x + x.sum(0, keepdim=True)), "shape"),
    "broadcast scalar": (kept(lambda _, x: x.sum() + x.sum(0)), "shape"),
    "sum along rows": (Function(lambda _, x: x * x.sum(1, keepdim=True)), "along"),
    "softmax along the batch": (Function(lambda _, x: x.log_softmax(0)), "along 0"),
    "a number more": (Function(lambda _, x: x.add(x, alpha=3)), "alpha"),
    "counts by five": (Function(counted), "alpha"),
    "a factor": (Function(lambda _, x: 2 * x), "float32"),
    "strides": (on_images(nn.Conv2d(3, 3, 1, stride=2), 3), "no kernel for convolution"),
    "dilation": (on_images(nn.Conv2d(3, 4, 2, dilation=(1, 2), padding=1), 24), "convolution"),
    "groups": (on_images(nn.Conv2d(3, 3, 1, groups=3), 12), "no kernel for convolution"),
    "a wide rim": (on_images(nn.Conv2d(3, 3, 1, padding=1), 48), "no kernel for convolution"),
    "transposed": (on_images(nn.ConvTranspose2d(3, 3, 1), 12), "no kernel for convolution"),
    "runs": (
        nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 3, 1), nn.Flatten()),
        "no kernel for convolution",
    ),
    "pools with gaps": (on_images(nn.AvgPool2d(1, stride=2), 3), "no kernel for avg_pool2d"),
    "pools with rims": (on_images(nn.MaxPool2d(2, padding=1), 12), "no kernel for max_pool2d"),
    "pools over a rim": (on_images(nn.AvgPool2d((2, 3), ceil_mode=True), 3), "avg_pool2d"),
    "pools of a part": (on_images(nn.MaxPool2d(1, dilation=2), 12), "no kernel for max_pool2d"),
    "pools that sum": (on_images(nn.AvgPool2d(2, divisor_override=1), 3), "avg_pool2d"),
    "rows of a buffer": (Table(), "only the data are gathered"),
    "frozen batch norm": (nn.BatchNorm1d(12), "does not use the batch's statistics"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_there_is_no_kernel_for_is_refused(data, name):
    layer, reason = REFUSED[name]
    network = mlp(layer)
    if name == "frozen batch norm":
        layer.eval()
    tensors = arguments(network, data, torch.arange(32))
    with pytest.raises(NotLoweredError, match=reason):
        program.make(network, 1, "0..1", tensors, "native")


@pytest.mark.parametrize("channels", [1, 4])
def test_convolutions_of_large_images_are_refused(data, monkeypatch, channels):
    network = mlp(on_images(nn.Conv2d(3, channels, 1), 4 * channels))
    tensors, most = arguments(network, data, torch.arange(32)), 4 * max(3, channels)
    monkeypatch.setattr(lowering.images, "_LARGEST", most)
    program.make(network, 1, "0..1", tensors, "native")
    monkeypatch.setattr(lowering.images, "_LARGEST", most - 1)
    with pytest.raises(NotLoweredError, match="the images of convolution are too large"):
        program.make(network, 1, "0..1", tensors, "native")


def test_labels_that_are_no_classes_are_refused(data):
    network = mlp(nn.ReLU())
    for label in (-100, 10):
        labels = data[1].clone()
        labels[150] = label
        tensors = arguments(network, (data[0], labels), torch.arange(32))
        with pytest.raises(NotLoweredError, match="labels reach from"):
            program.make(network, 1, "0..1", tensors, "native")


def test_numbers_of_other_types_are_refused():
    with pytest.raises(NotLoweredError, match=r"no kernels for torch\.bfloat16"):
        lowering.lower(fx.Graph(), [torch.zeros(2, dtype=torch.bfloat16)])


def test_weights_in_another_order_and_missing_kernels_are_refused(data, monkeypatch):
    network = mlp(nn.ReLU())
    tensors = arguments(network, data, torch.arange(32))
    turned = [each.T.contiguous().T if each.ndim == 2 else each for each in tensors]
    with pytest.raises(NotLoweredError, match="argument 2 does not lie in memory in rows"):
        program.make(network, 1, "0..1", turned, "native")
    monkeypatch.setattr(lowering, "BUILT", False)
    with pytest.raises(NotLoweredError, match="the kernels are not built"):
        program.make(network, 1, "0..1", tensors, "native")
