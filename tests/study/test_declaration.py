import math

import pytest

from normlab.data import load, split
from normlab.errors import InputError
from normlab.study import Study, bundled_studies, find_study
from normlab.training import Replica


def test_a_study_survives_toml():
    study = Study(
        name="mine", arms=["plain", "batch@post+dropout:0.5"], lr=[0.1, 0.01], seeds=[7, 3]
    )
    assert Study.from_toml(study.to_toml()) == study


def test_the_bundled_study_is_the_texts():
    study = find_study("mnist-mlp-adam")
    assert (study.network, study.arms, study.activation) == (
        "mlp:32,32",
        ("plain", "batch"),
        "relu",
    )
    assert (study.optimizer, study.lr, study.batch_size) == ("adam", (0.01,), 32)
    assert (study.epochs, study.drop_last, study.scaling) == (10, True, "0..1")
    assert (study.dataset, study.validation, study.seeds) == ("mnist", 5000, tuple(range(10)))


def test_every_bundled_study_has_its_files_name_and_a_line_for_people():
    for name, study in bundled_studies().items():
        assert study.name == name
        assert study.description
        assert "\n" not in study.description


@pytest.mark.parametrize(
    ("given", "seeds"),
    [(3, (0, 1, 2)), ("3", (0, 1, 2)), ([3], (3,)), (["3", "7"], (3, 7)), ((5, 2), (5, 2))],
)
def test_a_number_of_seeds_counts_and_a_list_names(given, seeds):
    assert Study(seeds=given).seeds == seeds


def test_one_arm_and_one_rate_need_no_list():
    study = Study(arms="batch", lr=0.5, weight_decay=0)
    assert (study.arms, study.lr, study.weight_decay) == (("batch",), (0.5,), (0.0,))


def test_replicas_are_all_combinations_each_once():
    study = Study(arms=["plain", "batch"], lr=[0.1, 0.2], seeds=2)
    assert len(study.replicas) == len(set(study.replicas)) == 8
    # A study that is cut short has all its arms.
    assert study.replicas[:2] == [Replica("plain", 0.1, 0), Replica("batch", 0.1, 0)]
    study = Study(lr=[0.2, 0.1], weight_decay=[1e-3, 0], seeds=2)
    assert len(study.replicas) == len(set(study.replicas)) == 2 * 2 * 2 * 2
    assert study.settings == [(0.1, 0), (0.1, 1e-3), (0.2, 0), (0.2, 1e-3)]


def test_the_fingerprint_stands_for_what_is_declared_and_not_for_its_name():
    study = Study()
    assert study.fingerprint == Study(name="other", description="words").fingerprint
    fields = {"seeds": 9, "lr": 0.02, "epochs": 9, "margin_accuracy": 0.004, "arms": ["batch"]}
    changed = {study.with_fields({name: value}).fingerprint for name, value in fields.items()}
    assert len(changed | {study.fingerprint}) == len(fields) + 1


def test_a_study_without_probes_has_the_fingerprint_that_it_had_before_there_were_any():
    assert Study().fingerprint.startswith("ca38c6b3")
    probed = [
        Study(probes="units"),
        Study(probes=["gradients"]),
        Study(probes="units", probe_every=50),
    ]
    assert len({study.fingerprint for study in (Study(), *probed)}) == 4
    assert probed[0].probes == ("units",)
    assert all(Study.from_toml(study.to_toml()) == study for study in probed)


def test_a_study_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Study().epochs = 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epoch": 2}, r"unknown key 'epoch' \(did you mean epochs\?\)"),
        ({"qqqq": 2}, "unknown key 'qqqq'$"),
        ({"epochs": 0}, "epochs: input should be greater than or equal to 1, got 0"),
        ({"epochs": 2.5}, "epochs: input should be a valid integer"),
        ({"batch_size": -1}, "batch_size: input should be greater than or equal to 1, got -1"),
        ({"lr": 0}, "lr: input should be greater than 0, got 0"),
        ({"lr": -0.1}, "lr: input should be greater than 0, got -0.1"),
        ({"lr": "fast"}, "lr: input should be a valid number.*got 'fast'"),
        ({"lr": math.nan}, "lr: input should be .*got nan"),
        ({"lr": math.inf}, "lr: input should be a finite number, got inf"),
        ({"lr": [0.1, 0.1]}, "lr: each may be named once"),
        ({"lr": []}, "lr: .*at least 1 item"),
        ({"lr": [0.1, 0.2], "validation": 0}, "several learning rates need validation data"),
        ({"lr": [0.1, 0.2], "seeds": 1}, "several learning rates need at least two seeds"),
        ({"seeds": 0}, "0 seeds: from 1 to 10000 can be asked for"),
        ({"seeds": "many"}, "expected a number of seeds or a list of them, got 'many'"),
        ({"seeds": [1, 1]}, "seeds: each may be named once"),
        ({"seeds": [-1]}, "seeds: input should be greater than or equal to 0"),
        ({"seeds": []}, "seeds: .*at least 1 item"),
        ({"arms": ["plain", "bacth"]}, r"unknown arm 'bacth' \(did you mean batch\?\)"),
        ({"arms": ["batch", "batch@pre"]}, "arms 'batch' and 'batch@pre' are the same network"),
        (
            {"arms": ["batch", "batch+bfloat16"], "precision": "bfloat16"},
            r"arms 'batch' and 'batch\+bfloat16' are the same network",
        ),
        ({"arms": []}, "arms: .*at least 1 item"),
        ({"dataset": "minst"}, r"unknown dataset 'minst' \(did you mean mnist\?\)"),
        ({"network": "vgg"}, "unknown network 'vgg'"),
        ({"optimizer": "sdg"}, r"unknown optimizer 'sdg' \(did you mean sgd\?\)"),
        ({"momentum": 0.9}, "momentum=0.9 belongs to sgd, not adam"),
        ({"momentum": 1.0, "optimizer": "sgd"}, "momentum: input should be less than 1"),
        ({"weight_decay": -1}, "weight_decay: input should be greater than or equal to 0"),
        ({"weight_decay": math.nan}, "weight_decay: input should be .*got nan"),
        ({"weight_decay": [0, 0]}, "weight_decay: each may be named once"),
        ({"weight_decay": [0, 1], "validation": 0}, "several weight decays need validation data"),
        ({"weight_decay": [0, 1], "seeds": 1}, "several weight decays need at least two seeds"),
        ({"target_accuracy": 95}, "target_accuracy: input should be less than or equal to 1"),
        ({"margin_accuracy": 0}, "margin_accuracy: input should be greater than 0"),
        ({"confidence": 1}, "confidence: input should be less than 1"),
        ({"name": "../x"}, "name: string should match pattern"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        Study.make(fields, "my.toml")
    assert str(caught.value).startswith("my.toml: ")
    assert "\n" not in str(caught.value)


def test_toml_that_is_none_names_the_line():
    with pytest.raises(InputError, match=r"my.toml: not TOML: .*line 2"):
        Study.from_toml("epochs = 3\nlr = = 2\n", "my.toml")


def test_a_study_file_is_found_by_its_ending(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nseeds = 3\n')
    assert find_study(str(path)) == Study(name="mine", seeds=3)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        find_study(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        find_study(str(tmp_path / "absent.toml"))


def test_an_unknown_study_is_refused_with_what_is_bundled():
    with pytest.raises(InputError, match=r"'mnist-mlp-adma' \(did you mean mnist-mlp-adam\?\)"):
        find_study("mnist-mlp-adma")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 60_000}, r"larger than the training set \(55000 images\)"),
        ({"batch_size": 1}, "arm 'batch' would get a batch of one sample"),
        # 55,000 = 54 · 1018 + 28; 59,999 images leave one over in batches of 2.
        ({"validation": 1, "batch_size": 2, "drop_last": False}, "batch of one sample"),
        ({"arms": ["plain", "group:5"]}, "group:5 does not divide a layer of 32 channels"),
        ({"arms": ["plain", "instance"]}, "finds nothing to normalize"),
    ],
)
def test_what_only_the_data_can_show_is_refused_too(fields, message):
    study = Study.make(fields)
    with pytest.raises(InputError, match=message):
        study.check_against(split(load("mnist"), study.validation))


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 1, "arms": ["plain", "layer"]},
        {"validation": 1, "batch_size": 2, "drop_last": True},
        {"batch_size": 55_000},
    ],
)
def test_what_the_data_allow_is_allowed(fields):
    study = Study.make(fields)
    study.check_against(split(load("mnist"), study.validation))
