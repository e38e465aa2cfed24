"""Compiles the kernels, for `python -m normlab.kernels` and for the build of the package.

Only the standard library and a C++ compiler are needed: the package is built before anything else
is installed.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

__all__ = ["LIBRARY", "SOURCES", "build", "instruction_sets"]

SOURCES = [
    Path(__file__).with_name(f"{name}.cpp")
    for name in ("batch_norm", "convolution", "pooling", "product", "steps")
]
LIBRARY = Path(__file__).with_name("_kernels.so")

_FLAGS = [
    *("-std=c++17", "-fPIC", "-Wall", "-Wextra"),
    # Vectorized where the length is known only at run time; -O3 adds nothing but build time.
    *("-O2", "-ftree-vectorize"),
    # The loops look neither at errno nor at exceptions; NaN and Inf keep their meaning.
    *("-fno-math-errno", "-fno-trapping-math"),
]


def instruction_sets() -> dict[str, list[str]]:
    """Return what the kernels are compiled for: names, best last, and their flags."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        # What a compiler takes for too much, 64 bytes at once, suits kernels that wait for memory.
        wide = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
        return {"base": [], "v3": ["-march=x86-64-v3"], "v4": wide}
    return {"base": []}


def build(library: Path = LIBRARY, extra: tuple[str, ...] = ()) -> Path:
    """Compile the kernels into a shared library, whole or not at all.

    Args:
        library: The file to write.
        extra: More flags for the compiler and the linker.

    Returns:
        `library`.

    Raises:
        OSError: There is no C++ compiler, or it failed; the message has its last words.
    """
    compiler = _compiler()
    # Without OpenMP (Apple's compiler) the kernels run on one thread.
    threads = ["-fopenmp"] if _compiles(compiler, "-fopenmp") else ["-Wno-unknown-pragmas"]
    flags = [*_FLAGS, *threads, *extra]
    if not _compiles(compiler, "-fvect-cost-model=dynamic"):
        flags = [flag for flag in flags if flag != "-ftree-vectorize"]
    else:
        flags.append("-fvect-cost-model=dynamic")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:

        def compile_for(task: tuple[Path, str]) -> str:
            source, name = task
            compiled = str(Path(folder, f"{source.stem}.{name}.o"))
            options = [*flags, *instruction_sets()[name], f"-DNORMLAB_SUFFIX={name}"]
            _run([*compiler, *options, "-c", str(source), "-o", compiled])
            return compiled

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile_for, product(SOURCES, instruction_sets())))
        linked = Path(folder, library.name)
        _run([*compiler, "-shared", *objects, *flags, "-o", str(linked)])
        linked.replace(library)
    return library


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise OSError("no C++ compiler was found: install one (g++ or clang++), or name it in CXX")


def _compiles(compiler: list[str], flag: str) -> bool:
    command = [*compiler, flag, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
