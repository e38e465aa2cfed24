"""Compiles the kernels into the wheel, where there is a C++ compiler."""

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):
    """Adds the shared library, which needs neither Python's nor torch's headers."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; without a compiler the wheel is pure, and torch's kernels do the work."""
        del version
        native = runpy.run_path(str(Path(self.root, "src/normlab/kernels/build.py")))
        try:
            library = native["build"]()
        except OSError as error:
            self.app.display_warning(f"normlab is built without its fast kernels: {error}")
            return
        build_data["pure_python"] = False
        # Any Python 3 can load it: only the machine matters.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(str(library.relative_to(self.root)))
