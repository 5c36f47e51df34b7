"""Finds the library of kernels for this processor: prebuilt, or else compiled.

A wheel holds every variant of `chargpt.compute.build`. Elsewhere, the best one is compiled on its
first use: see `chargpt.compute.library_cache`.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from chargpt.compute import build
from chargpt.compute.build import Variant
from chargpt.compute.device import cpu_info
from chargpt.compute.library_cache import compiled, loads, one_line

PREBUILT = Path(__file__).parent / "lib"
CHOICE = "CHARGPT_KERNELS_VARIANT"  # the environment variable that names a variant
_CPUINFO_NAMES = {"fma3": "fma", "bmi": "bmi1", "lzcnt": "abm"}  # by PyTorch's name


class KernelsError(Exception):
    """The kernels cannot be compiled or loaded here; use PyTorch's own layers."""


class Library(NamedTuple):
    """A library that can be loaded here."""

    path: Path
    variant: Variant
    how: str
    """Where it comes from, in words."""

    @property
    def name(self) -> str:
        """The variant, and digits that stand for its sources and flags."""
        return build.library_name(self.variant)


def get_library() -> Library:
    """Return the library that this process uses, or raise `KernelsError`; it is found once."""
    found = _find_once()
    if isinstance(found, KernelsError):
        raise found.with_traceback(None)
    return found


@functools.cache
def _find_once() -> Library | KernelsError:
    try:
        return find_library()
    except KernelsError as error:
        return error


def find_library() -> Library:
    """Return the library with the variant of `choose_variant`.

    Raises:
        KernelsError: as `choose_variant`; or it is not prebuilt and cannot be compiled.
    """
    variant = choose_variant()
    path = _prebuilt(variant)
    if path.is_file() and loads(path):
        return Library(path, variant, f"prebuilt, {variant.name}")
    try:
        path, how = compiled(variant)
        return Library(path, variant, how)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsError(one_line(error)) from error


def why_not_tried() -> str:
    """Return why the setting "auto" does not try the kernels on this system, or "".

    On macOS, a call of a compiler that is not installed opens a window; on Windows few have one.
    """
    if sys.platform.startswith("linux") or _prebuilt(choose_variant()).is_file():
        return ""
    return "none are prebuilt in this installation; --kernels on compiles them"


def choose_variant() -> Variant:
    """Return the fastest variant that this processor can run, or the one in `CHOICE`.

    Raises:
        KernelsError: `CHOICE` names an unknown variant, or one that this processor cannot run.
    """
    found = capabilities()
    variants = {variant.name: variant for variant in build.variants_of(platform.machine())}
    able = {name: variant for name, variant in variants.items() if variant.needs <= found}
    wanted = os.environ.get(CHOICE) or [*able][-1]
    if wanted in able:
        return able[wanted]
    why = "does not exist on this machine"
    if wanted in variants:
        why = f"this processor cannot run ({', '.join(sorted(variants[wanted].needs - found))})"
    raise KernelsError(f"{CHOICE} is {wanted!r}, which {why}: give {' or '.join(able)}")


def capabilities() -> set[str]:
    """Return what PyTorch and Linux report for every core, as `Variant.needs` names it."""
    lists = cpu_info("flags") or cpu_info("Features")  # x86 or ARM
    reports = [flags.split() for flags in lists]
    if hasattr(torch.cpu, "get_capabilities"):  # newer versions of PyTorch
        known = torch.cpu.get_capabilities().items()
        reports.append([_CPUINFO_NAMES.get(name, name) for name, has in known if has is True])
    names = [{name.replace("_", "") for name in report} for report in reports]
    return set.intersection(*names) if names else set()


def _prebuilt(variant: Variant) -> Path:
    return PREBUILT / (build.library_name(variant) + build.SUFFIX)
