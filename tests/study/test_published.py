import math

import numpy as np
import pytest
from scipy import stats

from normlab.errors import InputError
from normlab.statistics import prediction_interval
from normlab.study import Comparison, PublishedFigure, Study, bundled_studies, run
from normlab.study.published import beside

LOSS = PublishedFigure(arm="batch", split="batches", metric="loss", epoch=1, steps=5, value=0.3)
RANGE = PublishedFigure(
    arm="batch", against="plain", metric="accuracy", epoch=2, value=0.01, to=0.02
)


def test_a_prediction_interval_has_one_more_value_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(20_000, 6))
    inside = 0
    for *seen, one_more in draws:
        low, high = prediction_interval(seen, 0.9)
        inside += low <= one_more <= high
    assert inside / len(draws) == pytest.approx(0.9, abs=0.01)


def test_figures_stand_beside_what_each_seed_measured_at_the_same_place():
    measured = {
        ("batch", "batches", "loss", 1, 5): {0: 0.31, 1: 0.35, 2: 0.33},
        ("batch", "batches", "loss", 1, 0): {0: 9.0, 1: 9.0, 2: 9.0},
        ("batch", "test", "accuracy", 2, 0): {0: 0.97, 1: 0.98, 3: 0.5},
        ("plain", "test", "accuracy", 2, 0): {1: 0.95, 0: 0.94},
    }
    loss, difference = beside((LOSS, RANGE), measured, 0.95)
    half = stats.t.ppf(0.975, 2) * 0.02 * math.sqrt(4 / 3)
    assert (loss["n"], loss["within"]) == (3, True)
    assert [loss[name] for name in ("mean", "sd", "difference", "low", "high")] == pytest.approx(
        [0.33, 0.02, 0.03, 0.33 - half, 0.33 + half]
    )
    # Both differences are 0.03, a point above the range, and no other seed would give another.
    assert difference["n"] == 2
    assert difference["mean"] == pytest.approx(0.03)
    assert difference["difference"] == pytest.approx(0.01)
    assert difference["within"] is False


@pytest.mark.parametrize(("mean", "difference"), [(0.005, -0.005), (0.015, 0.0), (0.03, 0.01)])
def test_a_mean_inside_a_printed_range_does_not_differ_from_it(mean, difference):
    measured = {
        ("batch", "test", "accuracy", 2, 0): {0: 0.9 + mean},
        ("plain", "test", "accuracy", 2, 0): {0: 0.9},
    }
    (row,) = beside((RANGE,), measured, 0.95)
    assert row["difference"] == pytest.approx(difference)
    assert (row["n"], row["sd"], row["low"], row["within"]) == (1, None, None, None)


def test_what_was_not_measured_is_said_to_be_so():
    (row,) = beside((LOSS,), {}, 0.95)
    assert (row["n"], row["mean"], row["difference"], row["within"]) == (0, None, None, None)


def test_places_and_figures_are_shown_as_the_text_has_them():
    assert LOSS.place == "batch, loss on the first 5 batches of epoch 2, as trained on"
    whole = LOSS.model_copy(update={"steps": 0})
    assert whole.place == "batch, loss on the batches of epoch 1, as trained on"
    assert RANGE.place == "batch against plain, test accuracy after epoch 2"
    assert (LOSS.printed, RANGE.printed) == ("0.300", "+1.00 points to +2.00 points")
    accuracy = PublishedFigure(arm="batch", metric="accuracy", epoch=1, value=0.4288)
    assert accuracy.printed == "42.88%"


def test_a_study_says_them_at_the_places_where_it_looked(tmp_path):
    places = [("batches", 0, 3), ("batches", 1, 0), ("test", 1, 3), ("test", 2, 0), ("test", 7, 0)]
    figures = [
        {
            "arm": "plain",
            "split": split,
            "metric": "loss",
            "epoch": epoch,
            "steps": steps,
            "value": 1,
        }
        for split, epoch, steps in places
    ]
    study = Study(
        network="mlp:8",
        arms=["plain"],
        batch_size=200,
        validation=59_000,
        seeds=2,
        epochs=2,
        evaluate_every=3,
        published=figures,
    )
    run(study, tmp_path)
    comparison = Comparison(tmp_path)
    frame = comparison.frame().query("metric == 'loss'")
    for row, (split, epoch, steps) in zip(comparison.published, places, strict=True):
        seen = frame[(frame["split"] == split) & (frame["step"] == epoch * 5 + steps)]["value"]
        assert row["n"] == len(seen) == (0 if epoch == 7 else 2)
        if row["n"]:
            assert row["mean"] == pytest.approx(seen.mean())
    assert comparison.summary()["published"] == comparison.published


def test_they_are_for_people_and_change_nothing_that_is_measured():
    study = Study(published=[LOSS], protocol={"seeds": 1})
    assert study.fingerprint == Study().fingerprint
    assert Study.from_toml(study.to_toml()) == study


@pytest.mark.parametrize("name", ["mnist-mlp-sgd", "mnist-mlp-adam"])
def test_what_was_published_is_not_of_another_network_or_other_data(name):
    study = bundled_studies()[name]
    kept = study.with_fields({"seeds": 3, "epochs": 2, "validation": 100, "target_accuracy": 0.9})
    assert (kept.published, kept.description) == (study.published, study.description)
    for field in ({"network": "mlp:8"}, {"dataset": "./mine"}, {"batch_size": 7}, {"lr": 0.5}):
        other = study.with_fields(field)
        assert (other.published, other.protocol, other.description) == ((), {}, "")
    told = study.with_fields({"network": "mlp:8", "description": "mine"})
    assert (told.published, told.description) == ((), "mine")


def test_a_study_as_published_has_the_texts_own_fields():
    study = Study(name="mine", published=[LOSS], protocol={"validation": 0, "seeds": 1}, epochs=3)
    text = study.as_published()
    assert (text.name, text.validation, text.seeds) == ("mine-as-published", 0, (0,))
    assert (text.epochs, text.published) == (3, study.published)
    assert text.fingerprint != study.fingerprint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Study().as_published(), "study is of no text: it has no protocol"),
        (lambda: Study.make({"protocol": {"epoch": 1}}), r"unknown key 'epoch' \(did you mean ep"),
        (lambda: Study(protocol={"lr": -1}).as_published(), "study-as-published: lr: input should"),
        (
            lambda: Study.make({"published": [RANGE.model_dump(), {"arm": "batch"}]}),
            "published figure 2: metric: field required",
        ),
        (
            lambda: Study.make({"published": [{**RANGE.model_dump(), "too": 3}]}),
            r"published figure 1: unknown key 'too' \(did you mean to\?\)",
        ),
        (
            lambda: Study.make({"published": [{**RANGE.model_dump(), "value": 65.0, "to": None}]}),
            "published accuracy 65.0: expected a share",
        ),
        (
            lambda: Study.make({"published": [{**RANGE.model_dump(), "to": 0.0}]}),
            "published from 0.01 to 0.0: the larger one comes last",
        ),
    ],
)
def test_what_cannot_be_is_one_line(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_every_bundled_study_of_a_text_can_be_run_as_published():
    texts = {name: study for name, study in bundled_studies().items() if study.protocol}
    assert set(texts) == {
        "cifar10-mlp-dropout",
        "fashion-lenet-sigmoid",
        "mnist-mlp-adam",
        "mnist-mlp-sgd",
        "mnist-solver",
    }
    for study in texts.values():
        assert len(study.as_published().seeds) == 1
        assert len(study.seeds) == 10
        arms = {figure.arm for figure in study.published}
        assert arms <= {*study.arms}
