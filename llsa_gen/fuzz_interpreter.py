"""Triton's interpreter as the fuzzer needs it: products that round alike from either side.

The backward pass works out the logits once more, as k q^T where the forward pass had q k^T, and takes its weights from
the difference to their sum. A GPU adds both up in the same order. numpy's BLAS does not on every processor, and a
softmax that is nearly one key is then off by the roundoff of its logit, which is no fault of a kernel.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

__all__ = ["products_alike"]


@contextmanager
def products_alike() -> Iterator[None]:
    """Interpreted kernels sum their products in float64, and round once, within this context."""
    before = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = _create_dot
    try:
        yield
    finally:
        InterpreterBuilder.create_dot = before


def _create_dot(
    self: InterpreterBuilder, a: Any, b: Any, d: Any, input_precision: object, max_num_imprecise_acc: object
) -> TensorHandle:
    """a b + d; other than Triton's own it takes no float8, which no kernel has."""
    product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
    return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)
