"""One step of learning: model, averaged weights and optimiser, on one device, as one process of several or alone.

Batch number `step` follows from (seed, step) alone. A process takes its share of it, and takes that in parts. So the
gradient is that of the whole batch, to rounding, however many processes and parts there are; and a run that begins
again at a step goes on as if it had never ended.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, cast

import flow
import numpy as np
import torch
from graphs import Batch, Graph, Process, Replayed, graph_of
from model import PixelDiT
from settings import Settings
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.torch_version import TorchVersion

COMPILING: dict[str, Any] = {"triton.mix_order_reduction": False} if TorchVersion(torch.__version__) < "2.15" else {}
"""Options of torch.compile. Before torch 2.15, on a GPU, one of its fusions leaves the gradients of shifts and scales
unwritten where a batch is one picture: https://github.com/pytorch/pytorch/issues/193061. The model learns all the same,
and badly."""


class Source(Protocol):
    """What windows are drawn from: `data.Windows`, or anything like it."""

    def draw(self, seed: int, position: int) -> np.ndarray[Any, Any]:
        """Window number `position`: uint8 [height, width, 3]."""
        ...


class Learner:
    """Learns step by step: `learn(step)`. Everything that a checkpoint holds is in `state` and `load`.

    Args:
        settings: of the run.
        process: which process this is.
        graph: what records a step and replays it; unless given, the one that settings ask for, if any.

    Raises:
        ValueError: where the batch cannot be divided, or settings ask for a graph that cannot be had.
    """

    def __init__(self, settings: Settings, process: Process, graph: Graph | None = None) -> None:
        if settings.batch % (process.ranks * settings.accumulate):
            raise ValueError(
                f"batch: expected a multiple of {process.ranks} processes times accumulate {settings.accumulate}, "
                f"got {settings.batch}"
            )
        graph = graph or graph_of(settings, process)
        self.settings, self.process = settings, process
        self.scale = flow.noise_scale(*settings.size)
        torch.manual_seed(settings.seed)
        self.model = PixelDiT(
            settings.size, settings.attention, settings.order, settings.channels, settings.depth, settings.heads,
            settings.checkpointing, settings.layout, settings.modulate,
        ).to(process.device)  # fmt: skip
        self.average = get_ema_multi_avg_fn(settings.ema)
        self.averaged = AveragedModel(self.model, multi_avg_fn=self.average) if settings.ema else None
        run: nn.Module = self.model
        if settings.compile == "model":
            run = cast(nn.Module, torch.compile(run, options=COMPILING))
        elif settings.compile == "blocks":
            for block in self.model.blocks:
                block.compile(options=COMPILING)
        if process.ranks > 1:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of a name that 2.11 does not know
                run = DistributedDataParallel(run, broadcast_buffers=False)
        self.run = run
        self.lr = torch.tensor(settings.lr, device=process.device)  # a tensor: a recorded step reads it
        self.optimizer = torch.optim.AdamW(
            _groups(self.model, settings.weight_decay), lr=self.lr, betas=(0.9, 0.99), fused=True
        )
        self.total = torch.zeros((), device=process.device)
        self.step = Replayed(self._step, graph) if graph else self._step

    @property
    def part(self) -> int:
        """How many windows go through the model at once."""
        return self.settings.batch // (self.process.ranks * self.settings.accumulate)

    @property
    def best(self) -> PixelDiT:
        """The model that is validated and sampled from: that of averaged weights, if there are any."""
        return self.model if self.averaged is None else cast(PixelDiT, self.averaged.module)

    def batches(self, source: Source, step: int) -> Iterator[Batch]:
        """This process's share of batch number `step`, part by part."""
        seed, size = self.settings.seed, self.settings.size
        share = self.settings.batch // self.process.ranks
        first = step * self.settings.batch + self.process.rank * share
        for begin in range(first, first + share, self.part):
            positions = range(begin, begin + self.part)
            windows = np.stack([source.draw(seed, position) for position in positions])
            t, eps = zip(*(flow.draw_noise(seed, position, *size) for position in positions), strict=True)
            yield self.batch(torch.from_numpy(windows), torch.tensor(t), torch.stack(eps))

    def batch(self, windows: Tensor, t: Tensor, eps: Tensor) -> Batch:
        """windows uint8 [B, height, width, 3], t [B] and eps [B, 3, height, width] as the model's tokens."""
        windows, t, eps = (self._sent(x) for x in (windows, t, eps))
        x_0 = windows.permute(0, 3, 1, 2).float() / 127.5 - 1
        given, wanted = flow.noised(x_0, t, eps, self.scale)
        return Batch(self.model.to_tokens(given), t, self.model.to_tokens(wanted))

    def learn(self, step: int, batches: Iterable[Batch]) -> Tensor:
        """One step: the loss of its batch, this process's share of it, as a tensor that nobody has waited for."""
        self.lr.fill_(self.settings.lr * min(1.0, (step + 1) / self.settings.warmup))
        self.step(batches)
        if self.averaged is not None:
            if self.averaged.n_averaged == 0:  # on the host: a count is no parameter, and was sent nowhere
                self.averaged.module.load_state_dict(self.model.state_dict())  # averages begin after the first step
            self.averaged.n_averaged += 1
        return self.total.clone()

    def _step(self, batches: Iterable[Batch]) -> None:
        """What is recorded: no number of it is the host's, but for settings."""
        self.optimizer.zero_grad()
        self.total.zero_()
        for number, batch in enumerate(batches, 1):
            last = number == self.settings.accumulate
            with contextlib.nullcontext() if last else self._apart():
                loss = self.loss(self.run, batch) / self.settings.accumulate
                loss.backward()
            self.total += loss.detach()
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self._update()

    @torch.no_grad()
    def _update(self) -> None:
        """Weights, then their averages: as `AveragedModel.update_parameters`, which sends its count to the device at
        every step, and copies buffers, which never change here."""
        recorded = self.process.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        for group in self.optimizer.param_groups:
            group["capturable"] = recorded  # for torch's check alone: a fused AdamW can always be recorded
        self.optimizer.step()
        if self.averaged is not None:
            self.average(list(self.averaged.module.parameters()), list(self.model.parameters()), 0)

    def loss(self, run: nn.Module, batch: Batch) -> Tensor:
        """The mean square of what is wrong: 1, about, for a model that says 0."""
        with self.precision():
            said = run(batch.given, batch.t)
        return nn.functional.mse_loss(said, batch.wanted)

    @torch.no_grad()
    def validate(self, windows: np.ndarray[Any, Any]) -> float:
        """The loss on windows uint8 [count, height, width, 3], of the best model, with noise and times that are
        always the same: another seed, another attention and another number of processes change none of them."""
        losses, times = [], flow.fixed_times(len(windows))
        for begin in range(0, len(windows), self.part):
            chosen = range(begin, min(begin + self.part, len(windows)))
            eps = torch.stack([flow.draw_noise(2**32, place, *self.settings.size)[1] for place in chosen])
            batch = self.batch(torch.from_numpy(windows[begin : chosen.stop]), times[begin : chosen.stop], eps)
            losses.append(float(self.loss(self.best, batch)) * len(chosen))
        return sum(losses) / len(windows)

    @torch.no_grad()
    def sample(self, count: int, steps: int, seed: int) -> Tensor:
        """Pictures [count, 3, height, width] in -1 ... 1, by the best model; the noise follows from the seed."""
        made = []
        for begin in range(0, count, self.part):
            places = range(begin, min(begin + self.part, count))
            eps = torch.stack([flow.draw_noise(seed, 2**40 + place, *self.settings.size)[1] for place in places])
            with self.precision():
                made.append(flow.sample(self.best.velocity, self._sent(eps), self.scale, steps).cpu())
        return torch.cat(made)

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """In which the model computes; its parameters are float32 all the same."""
        device = self.process.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def state(self) -> dict[str, Any]:
        """What has been learnt."""
        return {
            "model": self.model.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """And back."""
        self.model.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        if isinstance(self.step, Replayed):
            self.step.forget()  # the optimiser has other tensors now

    def _apart(self) -> contextlib.AbstractContextManager[object]:
        """Gradients of a part that is not the last one stay in this process."""
        return self.run.no_sync() if isinstance(self.run, DistributedDataParallel) else contextlib.nullcontext()

    def _sent(self, x: Tensor) -> Tensor:
        """On the device, without waiting for it."""
        if x.device == self.process.device or self.process.device.type != "cuda":
            return x.to(self.process.device)
        return x.pin_memory().to(self.process.device, non_blocking=True)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not."""
    parameters = list(model.parameters())
    return [
        {"params": [x for x in parameters if x.ndim == 2], "weight_decay": weight_decay},
        {"params": [x for x in parameters if x.ndim != 2], "weight_decay": 0.0},
    ]
