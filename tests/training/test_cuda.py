"""What can be said of a real GPU; skipped where there is none."""

from contextlib import closing

import pytest
import torch

from normlab.training import Choice, Engine, Measurement, Outcome, Recipe, Replica
from normlab.training.engine import run_replicas

DEVICE = "cuda"

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

ARMS = ["plain", "batch", "torch-batch+dropout:0.5", "layer"]


def losses_of(arm, network, kind, code, device=DEVICE, **options):
    recipe = Recipe(network=network, validation=59_000, epochs=2, optimizer="sgd", momentum=0.9)
    replicas = [Replica(arm, lr, seed) for seed in (0, 1) for lr in (0.01, 0.03)]
    chosen = {arm: Choice(arm, Engine(kind, code), {})}
    events = run_replicas(recipe, replicas, chosen=chosen, device=device, **options)
    seen = []
    with closing(events):
        for event in events:
            if isinstance(event, Measurement):
                seen.append(event.values["train", "loss"])
            if isinstance(event, Outcome):
                assert event.status == "done"
    return seen


@pytest.mark.parametrize("network", ["mlp:32,32", "lenet"])
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("kind", ["looped", "stacked"])
def test_graphs_train_as_the_cpu_does_and_twice_the_same(arm, network, kind):
    found = losses_of(arm, network, kind, "traced")
    assert found == losses_of(arm, network, kind, "traced")
    expected = losses_of(arm, network, kind, "traced", device="cpu")
    assert found == pytest.approx(expected, rel=2e-2)
    assert found == pytest.approx(losses_of(arm, network, "looped", "eager"), rel=2e-2)


@pytest.mark.parametrize("kind", ["looped", "stacked"])
def test_what_is_compiled_trains_so_too(kind):
    found = losses_of("batch", "mlp:32,32", kind, "compiled")
    assert found == pytest.approx(losses_of("batch", "mlp:32,32", kind, "traced"), rel=2e-2)


def test_a_passing_choice_is_a_graph():
    recipe = Recipe(network="mlp:32,32", validation=59_000, epochs=1)
    (choice, *_) = run_replicas(recipe, [Replica("batch", 0.01, 0)], device=DEVICE)
    assert choice.engine.code in ("traced", "compiled")
