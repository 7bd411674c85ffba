"""Train a pixel diffusion transformer. One command, with a GPU or small without:

    python examples/pixel_dit/photographs.py photographs
    python examples/pixel_dit/train.py runs/first --size 128 --shrink 2
    python examples/pixel_dit/train.py runs/small --config examples/pixel_dit/configs/small.yaml

    torchrun --nproc-per-node 2 examples/pixel_dit/train.py runs/two --size 128 --shrink 2

The same command again goes on where the run was ended, or killed. The folder of a run holds settings.json,
manifest.json (which pictures), log.jsonl (a line a step, and lines of validation), checkpoints/, samples.png, and with
matplotlib curves.png.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import attention
import checkpoints
import draw_curves
import flow
import settings
import torch
import torch.distributed as dist
from data import DataError, Windows
from graphs import Process
from learner import Learner
from model import Block
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sample import write_grid
from settings import Settings

Report = Callable[[int, str], None]
"""Told the number of steps done, and a line about them."""


class Run:
    """A run in a folder: learns until it is done, and writes down how.

    Args:
        folder: of the run; one that exists is resumed.
        wanted: its settings.
        windows: what it learns from.
        process: which process this is. The first one writes.

    Raises:
        ValueError: where the folder is of a run with other settings or pictures.
    """

    def __init__(self, folder: Path, wanted: Settings, windows: Windows, process: Process) -> None:
        self.folder, self.settings, self.windows, self.process = folder, wanted, windows, process
        self.learner = Learner(wanted, process)
        self.fixed = windows.fixed(wanted.validation)
        self.often = wanted.log_every, wanted.validate_every, wanted.checkpoint_every
        self.step, self.seconds = 0, 0.0
        self.share: float | None = None
        self.log = folder / "log.jsonl"
        self._resume()

    def train(self, report: Report | None = None) -> dict[str, Any]:
        """Learn to the end; the last lines of validation and training, as one mapping."""
        losses: list[torch.Tensor] = []
        last: dict[str, Any] = {}
        if self.step == 0:
            last |= self._validate()
        clock, counted, begun = time.perf_counter(), 0, self.step
        while self.step < self.settings.steps and not self._late():
            losses.append(self.learner.learn(self.step, self.learner.batches(self.windows, self.step)))
            self.step, counted = self.step + 1, counted + 1
            if self.step == begun + 1:  # it has compiled: time begins after it
                _ = losses[0].item()
                clock, counted = time.perf_counter(), 0
            log, validate, save = (self.step == self.settings.steps or self.step % every == 0 for every in self.often)
            if log or validate or save:
                values = self._read(losses)
                spent, losses = time.perf_counter() - clock, []
                self.seconds += spent
                last |= self._note(values, counted, spent, report)
                if validate:
                    last |= self._validate()
                if save:
                    self._save()
                clock, counted = time.perf_counter(), 0
        if checkpoints.there(self.folder / "checkpoints")[-1:] != [self._checkpoint()]:
            last |= self._validate()
            self._save()
        if self.process.rank == 0 and self.settings.samples:
            made = self.learner.sample(self.settings.samples, self.settings.sample_steps, self.settings.seed)
            write_grid(made, self.folder / "samples.png")
        return last

    def _late(self) -> bool:
        """Whether the time is up; the first process says so to all. Its clock is read where lines are written."""
        if not self.settings.seconds or self.step % self.settings.log_every:
            return False
        late = torch.tensor(self.seconds >= self.settings.seconds)
        if self.process.ranks > 1:
            late = late.to(self.process.device)
            dist.broadcast(late, 0)
        return bool(late)

    def _read(self, losses: list[torch.Tensor]) -> list[float]:
        """The losses of some steps over all processes: this waits for the device."""
        together = torch.stack(losses)
        if self.process.ranks > 1:
            dist.all_reduce(together)
        return (together / self.process.ranks).tolist()

    def _note(self, losses: list[float], counted: int, spent: float, report: Report | None) -> dict[str, Any]:
        """A line of the log for each step."""
        rate = None
        if counted:
            height, width = self.settings.size
            rate = counted * self.settings.batch * height * width / spent
            if report and self.share is None:  # it is for people who watch: nobody does in an ablation
                self.share = self._attention_share(spent / counted)
        first = self.step - len(losses) + 1
        speed = {"tokens_per_s": rate, "attention_share": self.share, "seconds": self.seconds}
        self._write({"step": first + place, "loss": loss, **speed} for place, loss in enumerate(losses))
        if report:
            line = f"loss {losses[-1]:.4f}"
            if rate is not None:
                line += f"  {rate / 1e3:,.1f}k tokens/s  {self.share:.0%} in attention"
            report(self.step, line)
        return {"step": self.step, "loss": losses[-1], **speed}

    def _attention_share(self, step_seconds: float) -> float:
        """How much of a step its attention takes: timed alone, once, at the shape that it has in a step."""
        model, (height, width) = self.learner.model, self.settings.size
        module = cast(Block, model.blocks[0]).attend
        if isinstance(module, attention.Nothing):
            return 0.0
        shape = (self.learner.part, self.settings.heads, height * width, model.head_dim)
        dtype = torch.bfloat16 if self.settings.precision == "bfloat16" else torch.float32
        once = attention.seconds(module, shape, dtype, self.process.device)
        return once * self.settings.depth * self.settings.accumulate / step_seconds

    def _validate(self) -> dict[str, Any]:
        if self.process.rank:
            return {}
        found = {"step": self.step, "validation": self.learner.validate(self.fixed), "seconds": self.seconds}
        self._write([found])
        return found

    def _write(self, lines: Iterable[dict[str, Any]]) -> None:
        if self.process.rank == 0:
            with self.log.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in lines)

    def _checkpoint(self) -> Path:
        return self.folder / "checkpoints" / f"step_{self.step:09}.pt"

    def _save(self) -> None:
        if self.process.rank == 0:
            content = {"step": self.step, "seconds": self.seconds, "share": self.share, **self.learner.state()}
            content |= {"settings": self.settings.model_dump(mode="json"), "manifest": self.windows.manifest()}
            checkpoints.save(self.folder / "checkpoints", self.step, content)

    def _resume(self) -> None:
        """From the last checkpoint, if there is one; what the log has of later steps is taken out of it."""
        manifest, found = self.windows.manifest(), checkpoints.there(self.folder / "checkpoints")
        if found:
            content = checkpoints.load(found[-1], self.process.device)
            wrong = settings.changed(Settings.model_validate(content["settings"]), self.settings)
            if content["manifest"] != manifest:
                wrong.append("data: expected the pictures in manifest.json, got others")
            if wrong:
                raise ValueError(f"{self.folder}: a run of other settings is there: {'; '.join(wrong)}")
            self.learner.load(content)
            self.step, self.seconds, self.share = content["step"], content["seconds"], content["share"]
        if self.process.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            logged = self.log.read_text(encoding="utf-8").splitlines() if found else []
            whole = (line for line in logged if line.endswith("}"))  # a kill may have cut off the last one
            kept = [line + "\n" for line in whole if json.loads(line)["step"] <= self.step]
            self.log.write_text("".join(kept), encoding="utf-8")
            for name, content in (("settings", self.settings.model_dump(mode="json")), ("manifest", manifest)):
                text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
                (self.folder / f"{name}.json").write_text(text, encoding="utf-8")


def process_of(device: str) -> Process:
    """This process, by what torchrun says in the environment; joins the others."""
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: expected cpu, for torch finds no GPU here, got {device}")
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(kind)
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
    return Process(torch.device(kind), rank, ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a pixel diffusion transformer; again, to go on.")
    parser.add_argument("folder", type=Path, help="of the run")
    settings.add_flags(parser)
    options = parser.parse_args()
    wanted = settings.from_flags(options)
    try:
        process = process_of(wanted.device)
        windows = Windows(Path(wanted.data), wanted.size, wanted.shrink)
        run = Run(options.folder, wanted, windows, process)
    except (DataError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    if process.rank == 0:
        parameters = sum(x.numel() for x in run.learner.model.parameters())
        kinds = f"{len(windows.train)} pictures to learn from, {len(windows.validation)} to validate on"
        print(f"{attention.name_of(wanted.attention)}, {parameters / 1e6:.1f}M parameters, {kinds}; step {run.step}")
        if windows.left_out:
            print(f"left out, smaller than a window: {', '.join(windows.left_out)}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, disable=process.rank != 0) as bar:
        task = bar.add_task("", total=wanted.steps, completed=run.step)
        last = run.train(lambda step, line: bar.update(task, completed=step, description=line))
    if process.rank == 0:
        alone = flow.pixelwise_loss(flow.fixed_times(10_000), run.learner.scale)
        print(f"step {last['step']}, loss {last['loss']:.4f}" if "loss" in last else f"step {run.step}: nothing to do")
        if "validation" in last:
            print(f"validation {last['validation']:.4f}; {alone:.4f} is the best that looks at each number alone")
        if find_spec("matplotlib"):
            draw_curves.draw({run.folder.name: draw_curves.lines_of(run.folder)}, run.folder / "curves.png")
        print(f"{run.folder}: {', '.join(sorted(path.name for path in run.folder.iterdir()))}")
    if process.ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
