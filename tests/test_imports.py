import sys

import pytest

from normlab.errors import InputError
from normlab.imports import call

MODULE = """
from types import SimpleNamespace

number = 3

def make():
    import beside
    return beside.value

def raises():
    raise KeyError("nothing")

class Nets:
    make = staticmethod(lambda: 5)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine_to_call.py").write_text(MODULE)
    (tmp_path / "beside.py").write_text("value = 4")
    (tmp_path / "broken_to_call.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("mine_to_call", "beside", "broken_to_call"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("folder")
def test_functions_of_the_current_folder_are_called_and_the_path_is_as_before():
    before = list(sys.path)
    assert call("mine_to_call:make") == 4
    assert call("mine_to_call:Nets.make") == 5
    assert sys.path == before


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_to_call:make", r"absent_to_call cannot be imported \(ModuleNotFoundError: "),
        ("broken_to_call:make", r"cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("mine_to_call:mak", r"mine_to_call has no mak \(did you mean make\?\)"),
        ("mine_to_call:Nets.made", r"mine_to_call has no Nets.made \(did you mean make\?\)"),
        ("mine_to_call:number", "expected a function, got int"),
        ("mine_to_call:raises", "mine_to_call:raises raised KeyError: 'nothing'"),
    ],
)
def test_what_cannot_be_called_is_one_line(name, message):
    before = list(sys.path)
    with pytest.raises(InputError, match=message):
        call(name)
    assert sys.path == before
