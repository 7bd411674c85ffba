"""Which kernel a launch is: the one in Triton or, if the schedule entry names that backend, the one in Gluon."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llsa_gen.runtime.module import INTERPRETED, PARTIAL_IN_GLUON

# ---- spliced into every module from here on


def in_triton(tile: dict[str, Any]) -> dict[str, Any]:
    """Tile shapes for the kernel in Triton: in an entry of another backend, its register cap is `triton_maxnreg`."""
    own = {name: value for name, value in tile.items() if name not in ("backend", "GAPS")}
    if tile.get("backend", "triton") != "triton":
        own.pop("maxnreg", None)
        if "triton_maxnreg" in own:
            own["maxnreg"] = own.pop("triton_maxnreg")
    return own


def is_in_gluon(tile: dict[str, Any]) -> bool:
    """Whether tile shapes are for the kernel in Gluon, of which the interpreter knows nothing."""
    return tile.get("backend") == "gluon_sm90" and not INTERPRETED


def variant(kernel: Any, tile: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Which kernel a launch is, and what it takes of its tile shapes.

    A pair is a kernel in Triton and one in Gluon. The latter may be slow with partial tiles: those stay in Triton, but
    where the tiles are partial for the GAPS of given lists alone.
    """
    if not isinstance(kernel, tuple):
        return kernel, in_triton(tile)
    if not is_in_gluon(tile) or not (PARTIAL_IN_GLUON or tile.get("FULL", True) or tile["GAPS"]):
        return kernel[0], in_triton(tile)
    taken = ("num_warps", "maxnreg", *kernel[1].arg_names)
    return kernel[1], {name: value for name, value in tile.items() if name in taken}
