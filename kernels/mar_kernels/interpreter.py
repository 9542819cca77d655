"""Triton's interpreter, which runs kernels on a CPU: whether it does, and one mend."""

from typing import Any

import triton
from triton.runtime import interpreter

# TRITON_INTERPRET=1, as it was when the kernels were made
INTERPRETED = triton.knobs.runtime.interpret


def let_scalars_be_indices() -> None:
    """A number that a kernel is called with becomes a Python integer, as in `range`.

    The interpreter keeps numbers as arrays [1]. Before 3.7 it makes an integer of such an array,
    which numpy refuses from 2.4 on.
    """
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_tensor_and_index


MAJOR, MINOR = triton.__version__.split(".")[:2]
if INTERPRETED and (int(MAJOR), int(MINOR)) < (3, 7):
    let_scalars_be_indices()
