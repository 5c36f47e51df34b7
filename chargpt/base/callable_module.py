"""Modules that are called like the function of their own name.

``chargpt.train`` is a module, so that ``from chargpt.train import fit`` works, and Python puts it
into the package as an attribute when it is first imported. ``chargpt.train("my.txt")`` works, too,
because the module can be called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Let a call of `module` call `function`.

    Args:
        module: the full name of an imported module.
        function: what to call.
    """
    kind = type("CallableModule", (ModuleType,), {"__call__": staticmethod(function)})
    sys.modules[module].__class__ = kind
