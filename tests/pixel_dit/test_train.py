"""Training: it learns, goes on after a kill with the same bits, and does not care how a batch is divided."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from data import Windows
from flow import fixed_times, pixelwise_loss
from graphs import Process
from learner import Learner
from sample import learner_of, write_grid
from settings import Settings
from tiny_runs import SMALL, draw_pictures, small
from torch.multiprocessing.spawn import spawn
from train import Run, process_of

ALONE = Process(torch.device("cpu"))
ON_A_GPU: dict[str, Any] = {
    "device": "cuda", "size": 64, "attention": "llsa_l2", "channels": 128, "precision": "bfloat16", "compile": "blocks",
}  # fmt: skip
TRAIN = Path(__file__).resolve().parents[2] / "examples" / "pixel_dit" / "train.py"


def run(folder: Path, pictures: Path, settings: Settings) -> Run:
    return Run(folder, settings, Windows(pictures, settings.size, settings.shrink), process_of(settings.device))


def losses(folder: Path, kind: str = "loss") -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line[kind]) for line in lines if kind in line]


def test_it_learns(pictures: Path, tmp_path: Path) -> None:
    settings = small(steps=60, batch=8, log_every=20, checkpoint_every=60)
    last = run(tmp_path / "run", pictures, settings).train()
    found = [loss for _, loss in losses(tmp_path / "run")]
    assert found[0] > 0.9
    assert last["validation"] < 0.7 * pixelwise_loss(fixed_times(1000), 1.0)


@pytest.mark.parametrize("attention", ["small", "dense"])
def test_pictures_of_any_shape_are_learnt_and_drawn(attention: str, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "others", 3, 50, 70)
    settings = small(size="24x40", steps=2, attention=attention, samples=3, sample_steps=2)
    run(tmp_path / "run", pictures, settings).train()
    assert (tmp_path / "run" / "samples.png").exists()
    made = learner_of(tmp_path / "run", torch.device("cpu"), (9, 14)).sample(2, 2, 0)
    assert made.shape == (2, 3, 9, 14) and made.isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="cpu"),
        pytest.param(ON_A_GPU, id="replayed", marks=pytest.mark.gpu),
        pytest.param(ON_A_GPU | {"compile": "none", "cuda_graph": False}, id="eager", marks=pytest.mark.gpu),
    ],
)
def test_a_run_that_was_killed_goes_on_with_the_same_bits(changes: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 after some line of the log, which need not be that of a checkpoint."""
    pictures, steps = draw_pictures(tmp_path / "pictures", height=70), 41
    often = {"steps": steps, "log_every": 1, "checkpoint_every": 7, "validate_every": 8}
    given = SMALL | changes | often | {"data": pictures}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    command = [sys.executable, str(TRAIN), str(tmp_path / "killed"), *flags]
    log = tmp_path / "killed" / "log.jsonl"
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and killed.poll() is None:
        if log.exists() and log.read_text().count('"loss"') >= 10:
            break
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, killed.communicate()[1].decode()
    with log.open("a") as stream:
        stream.write('{"step": 12, "lo')  # a line that the kill cut off
    assert 1 <= len(checkpoints.there(log.parent / "checkpoints")) <= 2

    subprocess.run(command, check=True, capture_output=True)
    assert (log.parent / "curves.png").exists()
    torch.compiler.reset()
    seldom = {"log_every": steps, "checkpoint_every": steps}
    whole = run(tmp_path / "whole", pictures, small(**changes | often | seldom))
    whole.train()
    for kind in ("loss", "validation"):
        assert losses(log.parent, kind) == losses(whole.folder, kind)
    assert [step for step, _ in losses(whole.folder, "validation")] == [0, 8, 16, 24, 32, 40, 41]
    ends = [
        checkpoints.load(checkpoints.there(x / "checkpoints")[-1], ALONE.device) for x in (log.parent, whole.folder)
    ]
    for part in ("model", "averaged"):
        assert all(torch.equal(x, ends[1][part][name]) for name, x in ends[0][part].items())


def test_a_folder_of_another_run_is_an_error(pictures: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", pictures, small(steps=2)).train()
    with pytest.raises(ValueError, match=r"lr: expected 0.003, got 0.1"):
        run(tmp_path / "run", pictures, small(steps=4, lr=0.1))
    other = draw_pictures(tmp_path / "other", 5)
    with pytest.raises(ValueError, match=r"expected the pictures in manifest.json, got others"):
        run(tmp_path / "run", other, small(steps=4))
    assert run(tmp_path / "run", pictures, small(steps=4)).train()["step"] == 4


def test_the_last_two_checkpoints_stay_and_half_a_file_is_none(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, {"step": step})
    (tmp_path / "step_000000004.part").write_bytes(b"half")
    assert [checkpoints.load(path, ALONE.device)["step"] for path in checkpoints.there(tmp_path)] == [2, 3]


def gradients(settings: Settings, pictures: Path, process: Process = ALONE) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of the first step, and its gradients."""
    learner = Learner(settings, process)
    for module in (learner.model.modulation, learner.model.head):
        torch.nn.init.constant_(module.weight, 0.01)
    windows = Windows(pictures, settings.size)
    loss = learner.learn(0, learner.batches(windows, 0))
    return float(loss), {name: x.grad for name, x in learner.model.named_parameters() if x.grad is not None}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert (found[name] - x).norm() <= 1e-4 * x.norm() + 1e-8, name


def test_parts_of_a_batch_are_the_batch(pictures: Path) -> None:
    whole, parts = (gradients(small(accumulate=n, clip=0), pictures) for n in (1, 4))
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert_same(parts[1], whole[1])


def one_of_two(rank: int, pictures: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    found = gradients(small(accumulate=2, clip=0), pictures, Process(torch.device("cpu"), rank, 2))
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(pictures: Path, tmp_path: Path) -> None:
    spawn(one_of_two, (pictures, tmp_path), nprocs=2)
    whole = gradients(small(clip=0), pictures)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert sum(loss for loss, _ in shares) / 2 == pytest.approx(whole[0], rel=1e-5)
    for _, found in shares:
        assert_same(found, whole[1])


def test_a_batch_that_cannot_be_divided_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"batch: expected a multiple of 3 processes"):
        Learner(small(), Process(torch.device("cpu"), 0, 3))
    with pytest.raises(ValueError, match=r"accumulate: expected a divisor of batch 4, got 3"):
        small(accumulate=3)


def test_a_run_ends_when_its_time_is_up(pictures: Path, tmp_path: Path) -> None:
    last = run(tmp_path / "run", pictures, small(steps=10_000, seconds=0.2)).train()
    assert last["step"] < 1000 and last["seconds"] >= 0.2 and "validation" in last


def test_a_grid_shows_every_picture(tmp_path: Path) -> None:
    from PIL import Image

    write_grid(torch.stack([torch.full((3, 4, 6), x) for x in (-1.0, 0.0, 1.0)]), tmp_path / "grid.png", columns=2)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (14, 10)
        assert [image.getpixel(place) for place in ((0, 0), (8, 0), (0, 6))] == [(0,) * 3, (128,) * 3, (255,) * 3]


def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"attention: expected dense, .*, one of .*small.*, got nothing"):
        Learner(small(attention="nothing"), ALONE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: expected cpu, for torch finds no GPU here, got cuda"):
        process_of("cuda")


def test_flags_are_checked(tmp_path: Path) -> None:
    command = [sys.executable, str(TRAIN), str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(TRAIN.parents[2])}
    for flags, said in (
        (["--batch", "many"], "batch: Input should be a valid integer"),
        (["--data", str(tmp_path / "nowhere")], "expected a folder of pictures or a zip file"),
        (["--config", str(tmp_path / "nowhere.yaml")], "nowhere.yaml: expected a YAML file"),
        (["--config", str(TRAIN)], "train.py: expected a YAML file"),
    ):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, env=environment)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
