"""Several processes on one machine, joined by gloo: what runs in each is a function of a test file."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def in_processes(count: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` returns in each of `count` processes, in their order; an error in one is raised here."""
    start_processes(_run, (count, folder, work, args), nprocs=count, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _run(rank: int, count: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(seconds=120))
    try:
        torch.save(work(*args), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
