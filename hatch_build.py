"""Puts the kernels into a wheel: one library for each variant of `chargpt.compute.build`.

Such a wheel is for one platform and any Python 3. Without a compiler, or with
``CHARGPT_PURE_WHEEL=1``, a wheel has no library and is for any platform; the kernels are then
compiled on their first use. To build for another machine, name the platform and its compiler:
``_PYTHON_HOST_PLATFORM=linux-aarch64 CXX=aarch64-linux-gnu-g++``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARIES = "chargpt/compute/lib"


class KernelsHook(BuildHookInterface[Any]):
    """Compiles the variants for a wheel; an editable installation has none."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tell the builder what to add and for which platform the wheel is."""
        if version == "editable" or os.environ.get("CHARGPT_PURE_WHEEL"):
            return
        platform = self.build_config.builder.get_best_matching_tag().rpartition("-")[2]
        build = load_build_script(Path(self.root))
        self._folder = tempfile.TemporaryDirectory()
        try:
            variants = build.variants_of(machine_of(platform))
            libraries = build.build(variants, build.find_compiler(), Path(self._folder.name))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            self.app.display_warning(f"This wheel has no compiled kernels: {reason}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        for library in libraries:
            build_data["force_include"][str(library)] = f"{LIBRARIES}/{library.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the compiled files: the wheel holds them."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()


def load_build_script(root: Path) -> ModuleType:
    """Load ``build.py`` by its path: the package is not installed here."""
    path = root / "chargpt" / "compute" / "build.py"
    spec = importlib.util.spec_from_file_location("chargpt_build", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def machine_of(platform: str) -> str:
    """Return the machine in a wheel's platform, such as x86_64 in linux_x86_64."""
    found: list[str] = re.findall("x86_64|[a-z0-9]+", platform)
    return found[-1]
