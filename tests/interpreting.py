"""Triton's interpreter without the work that it does over and over: what it computes stays the same.

Two thirds of the time of a test went there.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from triton.language import core, semantic
from triton.runtime import interpreter


def patch() -> None:
    """Replace all that is spared; `__wrapped__` is what was there."""
    for owner, name, spared in places():
        whole = getattr(owner, name)
        setattr(owner, name, wraps(whole)(spared(whole)))


def places() -> list[tuple[Any, str, Callable[[Any], Any]]]:
    """What is replaced, of those that this version of Triton has: (owner, name, what makes the other one)."""
    wanted = [
        (interpreter, "_patch_lang", once_a_launch),
        (interpreter, "_get_np_dtype", once_a_name),
        (core.block_type, "__init__", once_a_shape),
        (core.tensor, "__init__", with_known_shapes),
        (semantic.TritonSemantic, "broadcast_impl_value", unless_alike),
        (semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", unless_debugging),
    ]
    return [place for place in wanted if hasattr(*place[:2])]


def once_a_launch(whole: Any) -> Any:
    """Whenever a kernel calls a device function, such as `tl.sum` or one of its module's own, the interpreter puts its
    own functions into `triton.language`, though they have been there since the launch began: once a launch and
    namespace."""
    patched: set[int] = set()  # namespaces that are served, by identity; empty between launches

    def once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None  # only what begins a launch asks for more, and then nothing is in the set
        scope = whole(fn)
        if not patched:
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        patched.add(id(fn.__globals__))
        return scope

    return once


def once_a_name(whole: Any) -> Any:
    """NumPy's dtype of one of Triton's is looked up in a table that is made for it."""
    known: dict[str, Any] = {}

    def found(dtype: Any) -> Any:
        name = (dtype.element_ty if dtype.is_block() else dtype).name
        if name not in known:
            known[name] = whole(dtype)
        return known[name]

    return found


def once_a_shape(whole: Any) -> Any:
    """A type of blocks checks its shape and prints it into a name. Here it also has its `sizes`, for the shape is a
    tuple of Triton's own, and slow to compare."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if type(size) is core.constexpr else size for size in shape])
        attributes = known.get((element_ty.name, sizes))
        if attributes is None:
            whole(self, element_ty, shape)
            attributes = known[element_ty.name, sizes] = {**self.__dict__, "sizes": sizes}
        self.__dict__.update(attributes, element_ty=element_ty)

    return init


def with_known_shapes(whole: Any) -> Any:
    """A tensor makes constants of the sizes of its type."""
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        sizes = type.__dict__.get("sizes", ())
        if sizes not in known:
            whole(self, handle, type)
            known[sizes] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = known[sizes]

    return init


def unless_alike(whole: Any) -> Any:
    """Operands of one shape are broadcast to it, for a tuple is compared with a list."""

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        sizes = lhs.type.__dict__.get("sizes")
        return (lhs, rhs) if sizes and sizes == rhs.type.__dict__.get("sizes") else whole(self, lhs, rhs)

    return broadcast


def unless_debugging(whole: Any) -> Any:
    """Whether a sum of integers leaves their range is worked out by a dozen operations for each, and then said to an
    assertion that does nothing unless the interpreter debugs, which it never does."""

    def check(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        if self.builder.options.debug:
            whole(self, lhs, rhs, binary_op)

    return check
