import importlib.util
import json
import subprocess
import sys

import pytest

# What `import torch` brings by itself is told apart in the subprocess.
HEAVY = [
    "PIL",
    "altair",
    "concurrent.futures.process",
    "filelock",
    "mlflow",
    "pandas",
    "platformdirs",
    "pooch",
    "pyarrow",
    "pydantic",
    "requests",
    "rich",
    "scipy",
    "sqlite3",
    "tensorboard",
    "tomli_w",
    "tyro",
    "vl_convert",
]


def in_a_new_process(program):
    """Run a program that ends in an expression; return the expression's value."""
    *lines, last = program.strip().splitlines()
    source = "\n".join(["import json", *lines, f"print(json.dumps({last}))"])
    command = [sys.executable, "-W", "error", "-c", source]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_what_only_studies_need_is_not_imported():
    program = f"""
import sys, torch
before = set(sys.modules)
import normlab
normlab.BatchNorm2d(3)(torch.ones(2, 3, 4, 4))
[name for name in {HEAVY} if name in set(sys.modules) - before]
"""
    assert in_a_new_process(program) == []


@pytest.mark.parametrize("name", HEAVY)
def test_what_is_called_heavy_exists(name):
    """The import of a misspelt module would never be noticed."""
    assert importlib.util.find_spec(name)


@pytest.mark.parametrize("first", ["", "import normlab.comparison", "import normlab.cli"])
def test_every_name_is_there_whatever_was_imported_first(first):
    program = f"""
{first}
import normlab
every = {{name: getattr(normlab, name) for name in normlab.__all__}}
[name for name, value in every.items() if getattr(value, "__name__", None) != name]
"""
    # A module in the place of a function is named normlab.something.
    assert in_a_new_process(program) == []


def test_a_star_brings_every_name():
    program = """
import normlab
from normlab import *
sorted(set(normlab.__all__) - set(globals()))
"""
    assert in_a_new_process(program) == []


def test_dir_names_everything_before_it_is_imported():
    program = """
import normlab
sorted(set(normlab.__all__) - set(dir(normlab)))
"""
    assert in_a_new_process(program) == []


def test_the_documented_rooms_are_there_without_an_import_of_their_own():
    program = """
import normlab
[normlab.surgery.exchange_norms.__name__, normlab.study.judge.__name__]
"""
    assert in_a_new_process(program) == ["exchange_norms", "judge"]


def test_an_unknown_name_is_pythons_own_error():
    import normlab

    with pytest.raises(AttributeError, match=r"^module 'normlab' has no attribute 'Stduy'$"):
        _ = normlab.Stduy
    with pytest.raises(ImportError, match="cannot import name 'comparre' from 'normlab'"):
        from normlab import comparre  # noqa: F401
