"""What every test runs under: which tests this machine can run, how hypothesis draws, and a cache of the run's own."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# One share of the cores for each worker, or they wait for each other; torch reads this once, when it is imported.
# Not in the process that starts the workers: they would inherit its value.
if "PYTEST_XDIST_WORKER" in os.environ:
    _share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _share)))

# What tests put into a cache by themselves would be refused if others could write it; tests of the umask set their own.
os.umask(0o022)

# No deadlines and no complaint about slow drawing: first calls compile, and the time they take says nothing.
_patient = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", **_patient)
settings.register_profile("ci", derandomize=True, **_patient)  # the same examples in every run
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    from interpreting import patch

    patch()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()  # ROCm devices answer here too


# Last, so that what -m and -k have left out already does not make it import torch.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under TRITON_INTERPRET=1 keeps the interpreter's tests alone; otherwise skips them, and GPU tests without a GPU.

    The variable turns every Triton kernel of a process into an interpreted one, so the two kinds cannot share one.
    """
    if INTERPRETING:
        others = [item for item in items if "interpret" not in item.keywords]
        if others:
            config.hook.pytest_deselected(items=others)
            items[:] = [item for item in items if "interpret" in item.keywords]
    else:
        for item in items:
            if "interpret" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1: make test-interpret"))

    needs_gpu = [item for item in items if "gpu" in item.keywords]
    if needs_gpu and not _has_gpu():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU"))


def pytest_collection_finish() -> None:
    """Leaves out of garbage collections what libraries have made so far, which stays, and collects less often.

    Tests that make many small objects take a fifth less time then. Tests of what is freed collect by themselves.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The store of this test run, shared by its workers, so that no test reads or fills the user's own."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "llsa_gen_cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLSA_GEN_CACHE_DIR", str(path))
        yield path
