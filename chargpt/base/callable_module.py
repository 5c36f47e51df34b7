"""Modules that can be called like the function of the same name.

``chargpt.train`` is a function, and a module that Python stores in the package on first import. A
callable module makes ``chargpt.train("my.txt")`` and ``from chargpt.train import fit`` both work.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Make a call of the imported `module` (its full name) a call of `function`; help shows it."""
    signature = inspect.signature(function)
    members = {"__call__": staticmethod(function), "__signature__": signature}
    callable_module = sys.modules[module]
    callable_module.__class__ = type("CallableModule", (ModuleType,), members)
    usage = f"{function.__name__}{signature}\n\n{inspect.getdoc(function)}"
    callable_module.__doc__ = f"{callable_module.__doc__}\n\n{usage}"
