"""`python -m normlab.kernels` compiles the kernels."""

import sys

from normlab.kernels.build import build

try:
    print(build())
except OSError as error:
    sys.exit(f"normlab: {error}")
