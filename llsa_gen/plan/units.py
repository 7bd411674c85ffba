"""Units: counts as people read them. Bytes in powers of 1024, FLOPs in powers of 1000."""

from rich.filesize import pick_unit_and_suffix

__all__ = ["counted", "human_bytes", "human_flops"]


def counted(number: int, what: str) -> str:
    """`1 token`, `65,536 tokens`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def human_bytes(size: int) -> str:
    """`142606336` as `136.0 MiB`."""
    return _human(size, ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"], 1024)


def human_flops(count: int) -> str:
    """`69430411264` as `69.4 GFLOP`."""
    return _human(count, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"], 1000)


def _human(value: int, suffixes: list[str], base: int) -> str:
    unit, suffix = pick_unit_and_suffix(value, suffixes, base)
    return f"{value:,} {suffix}" if unit == 1 else f"{value / unit:,.1f} {suffix}"
