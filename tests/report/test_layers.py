import io
import math
import re

import pytest
from rich.console import Console

import normlab
from normlab.report.layers import LayersTable, layers_html
from normlab.study import Study, layers_of


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    study = Study(
        network="mlp:6",
        arms=["plain", "batch", "layer"],
        batch_size=500,
        validation=55_000,
        seeds=2,
        epochs=1,
    )
    return normlab.compare(study, out=tmp_path_factory.mktemp("layers") / "run", progress=False)


def test_what_each_norm_held_at_the_end_is_kept_channel_by_channel(comparison):
    learned = comparison.learned()
    held = learned.groupby(["arm", "layer"])["name"].unique().map(sorted).to_dict()
    assert held == {
        ("batch", "hidden0.norm"): ["bias", "running_mean", "running_var", "weight"],
        ("layer", "hidden0.norm"): ["bias", "weight"],
    }
    assert set(learned["channel"]) == set(range(6))
    assert len(learned) == 2 * 6 * (4 + 2)
    # Ten steps of Adam with 0.01 move every γ, and none far.
    weights = learned.query("name == 'weight'")["value"]
    assert (weights != 1).all()
    assert weights.between(0.85, 1.15).all()


def test_layers_come_in_the_order_of_the_pass_with_what_they_learned(comparison):
    frame = comparison.layers()
    batch = frame[frame["arm"] == "batch"].set_index("layer")
    assert batch.index.tolist() == [
        "flatten",
        "hidden0.linear",
        "hidden0.norm",
        "hidden0.activation",
        "output",
    ]
    assert batch["shape"].tolist() == [(784,), (6,), (6,), (6,), (10,)]
    assert batch["parameters"].tolist() == [0, 785 * 6, 12, 0, 70]
    norm = batch.loc["hidden0.norm"]
    learned = comparison.learned().query("arm == 'batch' and name == 'bias'")["value"]
    assert norm["kind"] == "BatchNorm1d"
    assert (norm["bias_mean"], norm["bias_low"], norm["bias_high"]) == pytest.approx(
        (learned.mean(), learned.min(), learned.max())
    )
    assert math.isnan(batch.loc["output", "weight_mean"])
    assert "hidden0.norm" not in set(frame[frame["arm"] == "plain"]["layer"])


def test_a_studys_layers_are_those_of_its_run(comparison):
    columns = ["arm", "layer", "kind", "shape", "parameters"]
    planned = layers_of(comparison.study)
    assert planned.equals(comparison.layers()[columns])


def test_tables_show_them(comparison):
    frame = comparison.layers()
    html = layers_html(frame)
    (row,) = re.findall(r'<tr><th scope="row">hidden0.norm</th>(.*?)</tr>', html)[:1]
    norm = frame[(frame["arm"] == "batch") & (frame["layer"] == "hidden0.norm")].iloc[0]
    shown = f"{norm['weight_mean']:.2f} ({norm['weight_low']:.2f} to {norm['weight_high']:.2f})"
    assert f"<td>BatchNorm1d</td><td>6</td><td>12</td><td>{shown}</td>" in row
    assert html in (comparison.folder / "report.html").read_text("utf-8")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(LayersTable(frame))
    text = console.export_text()
    assert shown in text
    assert "plain" in text


def test_without_a_run_there_is_nothing_learned():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(LayersTable(layers_of(Study(network="lenet", arms=["batch"]))))
    text = console.export_text()
    assert "γ" not in text
    assert re.search(r"conv0.norm +BatchNorm2d +6×24×24 +12", text)
