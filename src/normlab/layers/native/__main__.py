"""`python -m normlab.layers.native` compiles the kernels."""

import sys

from normlab.layers.native.build import build

try:
    print(build())
except OSError as error:
    sys.exit(f"normlab: {error}")
