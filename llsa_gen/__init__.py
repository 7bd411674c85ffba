"""Log-linear sparse attention compiled from a declarative spec: the package's front door.

Names are imported when they are first used, so that ``import llsa_gen`` is immediate and declaring a `Spec` never pays
for torch or triton.
"""

from typing import TYPE_CHECKING

from llsa_gen import forks

if TYPE_CHECKING:
    from llsa_gen import fuzz, nn, order, reference
    from llsa_gen.compiler import compile
    from llsa_gen.errors import LlsaGenError
    from llsa_gen.joint import joint_attention, merge
    from llsa_gen.spec import Level, Spec, load

    __version__: str

__all__ = [
    "Level",
    "LlsaGenError",
    "Spec",
    "__version__",
    "compile",
    "fuzz",
    "joint_attention",
    "load",
    "merge",
    "nn",
    "order",
    "reference",
]

# Name -> (module, attribute of it; None for the module itself).
_HOMES = {
    "Level": ("llsa_gen.spec", "Level"),
    "LlsaGenError": ("llsa_gen.errors", "LlsaGenError"),
    "Spec": ("llsa_gen.spec", "Spec"),
    "compile": ("llsa_gen.compiler", "compile"),
    "fuzz": ("llsa_gen.fuzz", None),
    "joint_attention": ("llsa_gen.joint", "joint_attention"),
    "load": ("llsa_gen.spec", "load"),
    "merge": ("llsa_gen.joint", "merge"),
    "nn": ("llsa_gen.nn", None),
    "order": ("llsa_gen.order", None),
    "reference": ("llsa_gen.reference", None),
}

# Hidden from type checkers, to whom a module with __getattr__ has every name, misspelt ones too.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in ("__version__", *_HOMES):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with forks.whole(forks.IMPORT_SECONDS):  # every import that may happen here
            import importlib

            if name == "__version__":
                value = _version()
            else:
                module, attribute = _HOMES[name]
                value = importlib.import_module(module)
                if attribute is not None:
                    value = getattr(value, attribute)
        globals()[name] = value  # the next access does not come here
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


def _version() -> str:
    """The installed version; "0+unknown" where the package runs from a folder that nobody installed."""
    from importlib import metadata

    try:
        return metadata.version("llsa-gen")
    except metadata.PackageNotFoundError:
        return "0+unknown"
