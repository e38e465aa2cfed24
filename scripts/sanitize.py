"""Runs the kernels under the address, undefined-behaviour and thread sanitizers of clang.

    python scripts/sanitize.py

Needs clang and its OpenMP, whose runtime tells the thread sanitizer of its barriers (Debian:
clang, libomp-dev).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parent / "src/normlab/kernels"
IMAGES = [KERNELS / "convolution.cpp", KERNELS / "pooling.cpp"]
PRODUCT = KERNELS / "product.cpp"
PROGRAMS = {
    "batch norm": [HERE / "sanitize.cpp"],
    "images": [HERE / "sanitize_images.cpp", *IMAGES],
    "products": [HERE / "sanitize_products.cpp", PRODUCT],
    "steps": [HERE / "sanitize_steps.cpp", KERNELS / "batch_norm.cpp", *IMAGES, PRODUCT],
}
SANITIZERS = {
    "address,undefined": {},
    # The runtime of OpenMP is not instrumented; its tool, Archer, reports what it synchronizes.
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1", "OMP_TOOL": "enabled"},
}


def main() -> None:
    """Compile and run each; stop at the first that finds something."""
    compilers = ("clang++", *(f"clang++-{version}" for version in range(30, 13, -1)))
    compiler = next((name for name in compilers if shutil.which(name)), None)
    if compiler is None:
        sys.exit("sanitize: clang++ was not found: install clang and libomp-dev")
    # Vectors as wide as this processor has them: the wider, the farther they could reach.
    flags = ["-std=c++17", "-g", "-O1", "-march=native", "-fopenmp", "-Wno-pass-failed"]
    flags.append("-fno-sanitize-recover=all")
    for (sanitizer, options), (name, sources) in product(SANITIZERS.items(), PROGRAMS.items()):
        with tempfile.TemporaryDirectory() as folder:
            program = str(Path(folder, "sanitize"))
            command = [compiler, *flags, f"-fsanitize={sanitizer}", *map(str, sources)]
            subprocess.run([*command, "-o", program], check=True)
            done = subprocess.run([program], env=os.environ | options, check=False)
        print(f"{name}, {sanitizer}: {'failed' if done.returncode else 'nothing found'}")
        if done.returncode:
            sys.exit(1)


if __name__ == "__main__":
    main()
