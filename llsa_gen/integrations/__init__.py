"""Adapters that put compiled attention into models of other libraries; nothing is imported until it is used."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llsa_gen.integrations.engines import callable

__all__ = ["callable"]

if not TYPE_CHECKING:  # to type checkers a module with __getattr__ has every name

    def __getattr__(name: str) -> object:
        if name != "callable":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from llsa_gen.integrations.engines import callable

        return callable
