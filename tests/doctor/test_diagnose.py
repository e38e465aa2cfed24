"""What a diagnosis leaves alone, what it takes, what it refuses, and what it says."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn

import normlab
from normlab import diagnose
from normlab.doctor import SIGNALS
from normlab.errors import InputError

from .conftest import labelled


def network():
    torch.manual_seed(0)
    layers = (nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5))
    model = nn.Sequential(*layers, nn.Linear(5, 4), normlab.BatchNorm1d(4), nn.Linear(4, 3))
    for _ in range(60):
        model(torch.randn(64, 6))
    return model


def data(count=4, size=64):
    return labelled(count, size)


def everything(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [each.training for each in model.modules()],
        [(each.requires_grad, each.grad) for each in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )


def test_the_model_and_every_generator_are_as_they_were():
    model = network()
    model[1].eval()
    model[4].bias.requires_grad_(False)
    model[0].register_forward_hook(lambda *_: None)
    before = everything(model)
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*map(torch.cat, zip(*data(), strict=True))), 64, shuffle=True
    )
    diagnose(model, loader, optimizer=torch.optim.SGD(model.parameters(), 0.1), steps=60)
    after = everything(model)
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name
    assert before[1:] == after[1:]
    drawn = (torch.rand(1).item(), random.random(), np.random.rand())  # noqa: NPY002
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    assert drawn == (torch.rand(1).item(), random.random(), np.random.rand())  # noqa: NPY002


def test_the_model_is_as_it_was_when_it_raises():
    model, calls = network(), []

    def forward(model, batch):
        calls.append(batch)
        if len(calls) > 3:
            raise ZeroDivisionError("of the user's")
        return model(batch[0])

    before = everything(model)
    with pytest.raises(InputError, match=r"^batch 1.*ZeroDivisionError: of the user's$"):
        diagnose(model, data(), forward=forward)
    for name, value in everything(model)[0].items():
        assert torch.equal(value, before[0][name]), name
    assert everything(model)[1:] == before[1:]


def test_the_same_diagnosis_twice():
    model = network()
    one = diagnose(model, data())
    torch.rand(1)
    assert diagnose(model, data()) == one


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x, label=None):
        return {"logits": self.inner(x), "label": label}


def test_batches_may_be_mappings_and_outputs_too():
    named = [{"x": x, "label": y} for x, y in data()]
    model = ByName()
    one, two = diagnose(model.inner, data()), diagnose(model, named)
    assert "train/eval gap" not in one.not_measured
    assert one.not_measured == two.not_measured
    assert [n.worth for n in one.numbers] == [n.worth for n in two.numbers]


def test_other_batches_run_by_forward_and_an_iterator_is_enough():
    pairs = iter([{"image": x} for x, _ in data()])
    found = diagnose(network(), pairs, forward=lambda model, batch: model(batch["image"]))
    assert (found.batches, found.samples) == (4, 256)
    assert "labels" in found.not_measured["train/eval gap"]
    with pytest.raises(InputError, match=r"fixed\(batches\)"):
        found.fixed()
    assert found.fixed([{"image": x} for x, _ in data()]).after.batches == 4


def test_numbers_are_those_of_float64_by_hand():
    model, batches = network(), data()
    model[1].weight.data.copy_(torch.tensor([4.0, 0.0, 3.0, 1.0, 2.0]))
    x = [batch @ model[0].weight.double().T for batch in (b.double() for b, _ in batches)]
    whole = torch.cat(x)
    mean, var = whole.mean(0), whole.var(0)
    norm = model[1]
    z = (norm.running_mean - mean).abs() / (whole.var(0, correction=0) + norm.eps).sqrt()
    v = ((norm.running_var + norm.eps) / (var + norm.eps)).log().abs()
    spread = torch.stack([each.mean(0) for each in x]).var(0)
    worth = 1 / (spread / whole.var(0, correction=0)).mean()
    numbers = diagnose(model, batches).numbers[0]
    assert numbers.mean_off == pytest.approx(torch.quantile(z, 0.95).item(), rel=1e-4)
    assert numbers.variance_off == pytest.approx(torch.quantile(v, 0.95).item(), rel=1e-4)
    assert numbers.worth == pytest.approx(min(worth.item(), 64), rel=1e-4)
    assert numbers.gamma == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert (numbers.updates, numbers.values, numbers.channels, numbers.calls) == (60, 64, 5, 1)


def test_activations_have_the_numbers_of_their_kind():
    """And none of what saw nothing: a unit is a channel, and the last output has none."""
    norm = nn.BatchNorm1d(2)
    norm.bias.data.copy_(torch.tensor([-99.0, 99.0]))
    model = nn.Sequential(norm, nn.ReLU(), nn.Sigmoid(), nn.Flatten(0), nn.ReLU(), nn.Sigmoid())
    units = diagnose(model, [torch.randn(64, 2)]).units
    rows = [(each.place, each.units, each.values, each.dead, each.saturated) for each in units]
    assert rows == [
        *(("1", 2, 64, 0.5, None), ("2", 2, 64, None, 0.5)),
        *(("4", 0, 0, None, None), ("5", 0, 0, None, None)),
    ]


def test_findings_are_told_by_weight_and_causes_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    for _ in range(60):
        model(torch.randn(64, 6))
    model[0].reset_running_stats()
    model[2].momentum = 0.99
    model[2].running_mean += 0.8 * model[2].running_var.sqrt()
    found = diagnose(model, [*data(), *data(1, 1)])
    assert [(each.weight, each.signal, each.layer) for each in found.findings] == [
        ("error", "never updated", "0"),
        ("error", "momentum convention", "2"),
        ("error", "tiny count", "0"),
        ("warning", "stale statistics", "2"),
        ("information", "redundant bias", "1"),
    ]


def test_answers_by_class_are_paired_with_those_of_the_same_samples_mixed(monkeypatch):
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), list(Drawing())
    seen = []
    signal = SIGNALS["order of the data"]
    monkeypatch.setitem(
        SIGNALS, "order of the data", lambda each: seen.append(each) or signal(each)
    )
    mixed = diagnose(model, batches).asked.mixed

    def right(batches):
        found = [(x, model(x).argmax(1) == y) for x, y in batches]
        return {
            tuple(x.tolist()): bool(each)
            for xs, rs in found
            for x, each in zip(xs, rs, strict=True)
        }

    by_class, rows = right(batches), [tuple(x.tolist()) for xs, _ in mixed for x in xs]
    assert seen[0].given.tolist() == [by_class[each] for each in rows]
    assert seen[0].answers.by_batch.tolist() == [right(mixed)[each] for each in rows]


def test_decay_is_zero_of_what_the_optimizer_has_not():
    model = network()

    def decays(optimizer):
        found = diagnose(model, data(), optimizer=optimizer).findings
        return {f.layer: f.measured for f in found if f.signal == "decay on γ and β"}

    assert decays(torch.optim.SGD([model[1].weight], 0.1, weight_decay=0.5)) == {"1": 0.5}
    assert decays(torch.optim.LBFGS(model.parameters())) == {}


def test_an_untrained_model_is_not_blamed_for_its_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    moved = [(5 + x, y) for x, y in data()]
    found = diagnose(model, moved)
    assert found.findings == ()
    assert "pass steps=" in found.not_measured["stale statistics"]
    assert diagnose(model, moved, steps=0).findings == ()
    told = diagnose(model, moved, steps=100)
    assert {each.signal for each in told.findings} >= {"never updated"}


def test_a_layer_that_is_not_called_is_told():
    model = network()
    model.spare = nn.Module()
    model.spare.norm = nn.BatchNorm1d(3)
    found = diagnose(model, data(), forward=lambda model, batch: model[:7](batch[0]))
    (finding,) = (f for f in found.findings if f.layer == "spare.norm")
    assert (finding.signal, finding.weight) == ("never updated", "information")
    assert (found.numbers[-1].calls, found.numbers[-1].values) == (0, None)


def test_a_loss_of_ones_own_is_asked_for_where_there_is_no_other():
    batches = [(x, x[:, :3]) for x, _ in data()]
    assert "loss=" in diagnose(network(), batches).not_measured["gradient explosion"]
    found = diagnose(network(), batches, loss=nn.functional.mse_loss)
    assert "gradient explosion" not in found.not_measured
    wrong = diagnose(network(), batches, loss=lambda output: output)
    assert "loss raised TypeError" in wrong.not_measured["gradient explosion"]
    flat = diagnose(network(), batches, loss=lambda output, _: output.detach().mean())
    assert "does not require grad" in flat.not_measured["gradient explosion"]


def test_wrappers_are_looked_into():
    model = network()
    assert diagnose(nn.DataParallel(model), data()) == diagnose(model, data())
    assert diagnose(torch.compile(model, backend="eager"), data()) == diagnose(model, data())


def test_a_fix_reaches_through_every_wrapper():
    model = network()
    model[1].momentum = 0.99
    twice = nn.DataParallel(nn.DataParallel(model))
    fix = diagnose(twice, data()).findings[0].fix
    assert fix == "model.module.module.get_submodule('1').momentum = 0.01"


def test_a_part_that_is_compiled_is_looked_into():
    """Compiled code does not see the hooks that measure."""
    model = network()
    compiled = nn.Sequential(torch.compile(model, backend="eager"))
    found, plain = (
        diagnose(each, data(), reference=data(10)) for each in (compiled, nn.Sequential(model))
    )
    assert [each.worth for each in found.numbers] == [each.worth for each in plain.numbers]
    assert found.not_measured == plain.not_measured


def test_wrong_input_is_refused_in_one_line():
    def refused(*arguments, **options):
        with pytest.raises(InputError) as caught:
            diagnose(*arguments, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    model, batches = network(), data()
    assert refused(nn.Sequential(nn.Linear(2, 2)), batches).startswith(
        "Sequential has no batch norm layers"
    )
    assert refused("model", batches) == "expected a torch.nn.Module, got str"
    assert refused(model, []).startswith("expected at least one batch, got none")
    assert "got Tensor; put a single batch in a list" in refused(model, batches[0][0])
    assert "got NoneType" in refused(model, None)
    assert "a batch is a str" in refused(model, ["x"])
    wrong = refused(model, [(torch.ones(4, 7), torch.zeros(4, dtype=torch.long))])
    assert wrong.startswith("batch 1, of shapes (4, 7) and (4,): the model raised RuntimeError: ")
    away = [(x.to("meta"), y) for x, y in batches]
    assert refused(model, away) == ("batch 1 is on meta and the model on cpu: pass device='cpu'")
    lazy = nn.Sequential(nn.LazyBatchNorm1d())
    assert refused(lazy, batches).endswith("has no shape yet: run the model on a batch once")
    for each in (nn.LazyBatchNorm1d(affine=False), nn.LazyLinear(6)):
        lazy = nn.Sequential(each, nn.BatchNorm1d(6))
        assert refused(lazy, batches).endswith("has no shape yet: run the model on a batch once")
    assert "a whole number" in refused(model, batches, steps=-1)
    assert "a whole number" in refused(model, batches, steps=1.5)
    assert "expected a torch optimizer, got str" in refused(model, batches, optimizer="adam")
    assert "reference: expected an iterable" in refused(model, batches, reference=3)
    assert refused(model, batches, reference=[]).startswith("reference: expected at least one")
    assert "gone through again" in refused(model, iter(batches), reference=batches)


def test_what_it_says():
    model = network()
    model[1].momentum = model[5].momentum = 0.99
    found = diagnose(model, data(), steps=60)
    assert found.summary.startswith("3 errors, ")  # One is of the dropout.
    text = str(found)
    assert "\nerror: momentum convention in 2 layers\n  1: momentum 0.99 (threshold 0.9)\n" in text
    assert "\n  fix: model.get_submodule('1').momentum = 0.01\n" in text
    assert "  shift of domain: reference=, batches of the training domain" in text
    frame = found.frame()
    assert list(frame["weight"]) == sorted(
        frame["weight"], key=["error", "warning", "information"].index
    )
    assert list(frame["layer"][:2]) == ["1", "5"]
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["findings"][0]["measured"] == 0.99
    assert len(told["layers"]) == 2
    assert "after: " in str(found.fixed())


def test_numbers_that_json_has_no_word_for_are_text():
    model = copy.deepcopy(network())
    with torch.no_grad():
        model[1].running_mean[0] = float("nan")
        model[1].weight[0] = float("inf")
    told = json.loads(json.dumps(diagnose(model, data()).to_json(), allow_nan=False))
    assert told["layers"][0]["gamma"] is None


NAN = float("nan")


def with_nan(*numbers):
    return [
        (torch.where(torch.arange(x.numel()).view_as(x) == 0, NAN, x) if i in numbers else x, y)
        for i, (x, y) in enumerate(data())
    ]


def test_nan_in_a_batch_is_an_error_and_the_rest_is_measured_without_it():
    model = network()
    whole = diagnose(model, [data()[i] for i in (0, 2, 3)])
    found = diagnose(model, with_nan(1))
    broken = [each for each in found.findings if each.signal == "not finite"]
    assert [(each.layer, each.weight, each.measured) for each in broken] == [("1", "error", 1.0)]
    assert "batches, of 4," in broken[0].quantity
    assert (found.numbers, found.units) == (whole.numbers, whole.units)
    others = [each.signal for each in found.findings if each.signal != "not finite"]
    assert others == [each.signal for each in whole.findings]
    scope = {"batches": with_nan(1)}
    exec(broken[0].fix, scope)
    assert len(scope["batches"]) == 3
    # Weights that are not finite before the layer are told by it too.
    with torch.no_grad():
        model[0].weight[0] = NAN
    (finding,) = diagnose(model, data()).findings[:1]
    assert (finding.signal, finding.layer, finding.measured) == ("not finite", "1", 4.0)


def test_a_reference_tells_another_domain_from_the_same():
    def shifted(batches):
        found = diagnose(network(), batches, reference=data(10)).findings
        return [each.layer for each in found if each.signal == "shift of domain"]

    assert shifted([(5 + x, y) for x, y in data()]) == ["1", "5"]
    assert shifted(data()) == []


def test_ranks_are_those_of_the_process_group(monkeypatch):
    def missing():
        return diagnose(network(), data()).not_measured.get("unsynced ranks", "")

    assert "two ranks" in missing()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert missing() == ""


def test_a_reference_that_is_not_finite_is_refused_and_a_batch_of_it_left_out():
    model, reference = network(), data(10)
    broken = [(x.fill_(NAN), y) for x, y in data(1)]
    with pytest.raises(InputError, match=r"^reference: expected at least one batch of finite"):
        diagnose(model, data(), reference=broken)
    found = diagnose(model, data(), reference=[*broken, *reference])
    assert found == diagnose(model, data(), reference=reference)


def test_a_batch_without_samples_is_told_by_its_size_alone():
    batches = [*data(), (torch.ones(0, 6), torch.ones(0, dtype=torch.long))]
    with pytest.warns(UserWarning, match="degrees of freedom"):
        found = diagnose(network(), batches)
    told = diagnose(network(), data())
    extra = [each for each in found.findings if each not in told.findings]
    assert {(each.signal, each.measured) for each in extra} == {("tiny count", 0.0)}
    assert set(told.findings) <= set(found.findings)
    assert [each.worth for each in found.numbers] == [each.worth for each in told.numbers]


def test_what_yields_the_batches_may_raise():
    def batches():
        yield data()[0]
        raise OSError("no such\nfile")

    with pytest.raises(
        InputError, match=r"^batches: what yields them raised OSError for batch 2: no such file$"
    ):
        diagnose(network(), batches())


def test_fixes_run_as_they_are_printed():
    """In the code of a user whose model is wrapped, and whose batches are of their own kind."""
    model = network()
    model[1].momentum = 0.99
    model[5].running_mean += 9
    model.spare = nn.Module()
    model.spare.norm = nn.BatchNorm1d(3)
    wrapped = nn.DataParallel(model)
    batches = [{"image": x} for x, _ in data()]

    def forward(model, batch):
        inner = model.module if isinstance(model, nn.DataParallel) else model
        return inner[:7](batch["image"])

    given = {"forward": forward, "device": "cpu"}
    findings = diagnose(wrapped, batches, **given).findings
    (fix,) = {each.fix for each in findings if each.signal == "stale statistics"}
    assert fix.endswith("(model, batches, forward=forward, device='cpu')")
    signals = ["momentum convention", "stale statistics", "never updated"]
    scope = {"model": wrapped, "batches": batches, "forward": forward, "normlab": normlab}
    for signal in signals:
        exec(next(each.fix for each in findings if each.signal == signal), scope)
    after = diagnose(scope["model"], batches, **given).findings
    assert {each.signal for each in findings} >= set(signals)
    assert {each.signal for each in after if each.weight != "information"}.isdisjoint(signals)
    assert "spare.norm" not in {each.layer for each in after}


def test_dropout_before_a_norm_weighs_less_once_it_is_recalibrated():
    weights = [
        [f.weight for f in diagnose(each, data()).findings if f.signal.startswith("dropout")]
        for each in (network(), normlab.recalibrate(network(), data())[0])
    ]
    assert weights == [["warning"], ["information"]]


class Drawing:
    """Batches by class, for which a random number is drawn each time."""

    def __iter__(self):
        torch.rand(1)
        x, y = (torch.cat(each) for each in zip(*data(), strict=True))
        order = y.argsort()
        yield from zip(x[order].split(64), y[order].split(64), strict=True)


def test_what_batches_draw_is_taken_back_though_they_are_mixed():
    before = torch.get_rng_state()
    assert diagnose(network_without_drawing(), Drawing()).asked.mixed is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_an_order_whose_worth_cannot_be_measured_is_told():
    def told(model, batches):
        return diagnose(model, batches).not_measured.get("order of the data", "")

    model, batches = network(), list(Drawing())
    assert told(model, batches) == ""
    assert told(model[:1].append(nn.BatchNorm1d(5)).append(nn.Unflatten(1, (5, 1))), batches)
    batches[1][0][0] = NAN
    assert "finite values" in told(model, batches)


def network_without_drawing():
    with torch.random.fork_rng():
        return network()
