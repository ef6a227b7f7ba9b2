"""Makes Triton's interpreter several times faster, for tests.

It patches `triton.language` at every call of a device function, which takes a millisecond and changes nothing: the
launch around it has done so. Only modules that a launch does not patch need it, once. Private names of triton, hence
here and not in the package; where they are gone, tests are slow, not wrong.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patched: set[str] = set()


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    module = self.fn.__module__
    if module not in _patched:
        _patched.add(module)
        # A launch patches what its kernel calls `tl`, and takes it back at its end; tl.core is patched for good.
        if any(inspect.ismodule(value) and value is tl.core for value in self.fn.__globals__.values()):
            interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def install() -> None:
    """In this process, from now on."""
    if hasattr(interpreter, "InterpretedFunction") and hasattr(interpreter, "_patch_lang"):
        interpreter.InterpretedFunction.__call__ = _call
