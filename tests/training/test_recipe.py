import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from normlab.training import Recipe


def test_a_recipe_cannot_be_changed():
    recipe = Recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.epochs = 3
    assert recipe.epochs == Recipe().epochs
    assert hash(recipe) == hash(Recipe())


def test_every_field_says_why_its_default_is_what_it_is():
    assert all(field.description for field in Recipe.model_fields.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"dataset": "mnits"},
            r"unknown dataset 'mnits' \(did you mean mnist\?\): known are mnist",
        ),
        ({"dataset": "imagenet"}, "unknown dataset 'imagenet': known are mnist"),
        ({"scaling": "0..2"}, r"unknown scaling '0..2' \(did you mean 0..1\?\)"),
        ({"scaling": "none"}, "unknown scaling 'none': known are 0..1, -1..1"),
        ({"activation": "relo"}, r"unknown activation 'relo' \(did you mean relu\?\)"),
        ({"activation": "ReLU6!"}, "known are relu, leaky_relu, sigmoid, tanh, silu, gelu"),
        ({"init": "xaver"}, r"unknown init 'xaver' \(did you mean xavier\?\)"),
        ({"init": "zeros"}, "unknown init 'zeros': known are torch, xavier"),
        ({"optimizer": "adm"}, r"unknown optimizer 'adm' \(did you mean adam\?\)"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion': known are adam, sgd"),
        ({"network": "leenet"}, r"unknown network 'leenet' \(did you mean lenet\?\)"),
        ({"network": "mlp:32,0"}, "whole numbers from 1 to 65536"),
        ({"momentum": 0.9}, "momentum=0.9 belongs to sgd, not adam"),
        ({"momentum": 0.9, "optimizer": "adam"}, "momentum=0.9 belongs to sgd, not adam"),
        ({"probes": "percentile"}, r"unknown probe 'percentile' \(did you mean percentiles\?\)"),
        ({"probes": ["units", "x"]}, "unknown probe 'x': known are percentiles, gradients, units"),
        ({"probes": ["units", "units"]}, "each may be named once"),
        ({"probe_every": 50}, "probe_every=50 belongs to probes: name some"),
    ],
)
def test_what_is_unknown_or_belongs_elsewhere_is_refused_with_a_hint(fields, message):
    with pytest.raises(ValidationError, match=message):
        Recipe(**fields)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, "greater than or equal to 1"),
        ("batch_size", -32, "greater than or equal to 1"),
        ("batch_size", 1.5, "valid integer"),
        ("epochs", 0, "greater than or equal to 1"),
        ("epochs", -1, "greater than or equal to 1"),
        ("epochs", float("inf"), "finite number"),
        ("validation", -1, "greater than or equal to 0"),
        ("evaluate_every", -1, "greater than or equal to 0"),
        ("probe_every", -1, "greater than or equal to 0"),
        ("momentum", -0.1, "greater than or equal to 0"),
        ("momentum", 1.0, "less than 1"),
        ("momentum", float("nan"), "finite number"),
        ("drop_last", "perhaps", "valid boolean"),
        ("epoch", 3, "Extra inputs are not permitted"),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(field, value, message):
    with pytest.raises(ValidationError, match=message) as refusal:
        Recipe(optimizer="sgd", **{field: value})
    assert [error["loc"] for error in refusal.value.errors()] == [(field,)]


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 1, "epochs": 1, "validation": 0, "evaluate_every": 0},
        {"optimizer": "sgd", "momentum": 0.0},
        {"optimizer": "sgd", "momentum": 0.999},
        {"optimizer": "adam", "momentum": 0.0, "precision": "bfloat16"},
        {"network": "lenet", "activation": "sigmoid", "init": "xavier", "scaling": "-1..1"},
    ],
)
def test_the_last_values_within_range_are_taken(fields):
    assert Recipe(**fields).model_dump(include=set(fields)) == fields


@pytest.mark.parametrize(
    ("size", "batch_size", "whole", "all_"),
    [(1000, 32, 31, 32), (992, 32, 31, 31), (993, 32, 31, 32), (5, 5, 1, 1), (7, 1, 7, 7)],
)
def test_an_epoch_has_its_whole_batches_or_the_last_smaller_one_too(size, batch_size, whole, all_):
    assert Recipe(batch_size=batch_size, drop_last=True).steps_per_epoch(size) == whole
    assert Recipe(batch_size=batch_size, drop_last=False).steps_per_epoch(size) == all_


@given(size=st.integers(1, 2**40), batch_size=st.integers(1, 10**6), drop_last=st.booleans())
def test_no_sample_is_counted_twice_or_lost(size, batch_size, drop_last):
    steps = Recipe(batch_size=batch_size, drop_last=drop_last).steps_per_epoch(size)
    seen = steps * batch_size
    assert size - batch_size < seen <= size if drop_last else size <= seen < size + batch_size
