import re

import pytest
import torch
from torch import nn

from normlab import diagnose
from normlab.errors import NormlabError

NAME = "<b>&amp;"


@pytest.fixture(scope="module")
def diagnosis():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module(NAME, nn.BatchNorm1d(6, momentum=0.99))
    model.add_module("linear", nn.Linear(6, 5))
    model.add_module("norm", nn.BatchNorm1d(5))
    model.add_module("act", nn.ReLU())
    for _ in range(60):
        model(torch.randn(64, 6))
    return diagnose(model, [torch.randn(64, 6) for _ in range(4)])


def test_the_chart_has_every_layer_and_its_numbers(diagnosis):
    spec = diagnosis.chart().to_dict()
    drift, gamma, units = spec["vconcat"]
    data = spec["datasets"]
    rows = data[drift["data"]["name"]]
    assert {row["layer"] for row in rows} == {NAME, "norm"}
    values = {(row["layer"], row["quantity"][:8]): row["value"] for row in rows}
    assert values["norm", "|running"] == diagnosis.numbers[1].mean_off
    assert values["norm", "|ln(runn"] == diagnosis.numbers[1].variance_off
    # Altair names each data set by its content, and the layers of a chart share one.
    assert [row["median"] for row in data[gamma["data"]["name"]]] == [1.0, 1.0]
    assert data[units["data"]["name"]] == [{"place": "act", "share": 0.0, "units": "dead"}]


def test_a_chart_without_γ_and_activations():
    model = nn.Sequential(nn.BatchNorm1d(2, affine=False))
    found = diagnose(model, [torch.ones(4, 2), torch.zeros(4, 2)])
    assert len(found.chart().to_dict()["vconcat"]) == 1


def test_the_page_is_one_file_with_everything_escaped(diagnosis, tmp_path):
    path = diagnosis.report(tmp_path / "new" / "page.html")
    page = path.read_text("utf-8")
    assert list(path.parent.iterdir()) == [path]
    before = page.partition("<script>")[0]
    assert not re.search(r"(src|href)=\"(?!data:|#)", before)
    assert "<b>" not in before
    assert "&lt;b&gt;&amp;amp;" in before
    assert "<svg" in before
    for finding in diagnosis.findings:
        assert finding.signal in before
    assert "model.get_submodule(" in before
    assert all(signal in before for signal in diagnosis.not_measured)
    assert page.count("</script>") == 3
    markup = page.partition('<script type="application/json"')[0]  # A spec has a $schema.
    assert not re.search(r"\$\w", markup)


def test_a_page_that_cannot_be_written_is_told(diagnosis, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NormlabError, match="the report cannot be written"):
        diagnosis.report(tmp_path / "file" / "page.html")


def test_a_notebook_shows_findings_and_the_chart(diagnosis):
    shown = diagnosis._repr_html_()
    assert "momentum convention" in shown
    assert "<svg" in shown
    assert "<b>" not in shown
