"""Steps that are recorded and replayed are the steps that run as they are, to the bit, through checkpoints as well."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import settings
import torch
from data import Windows
from graphs import WARM_UPS, Batch, Process, Replayed, graph_of
from learner import Learner
from tape import Tape
from tiny_runs import small
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

ALONE = Process(torch.device("cpu"))
STEPS = WARM_UPS + 5


def taught(learner: Learner, windows: Windows, begin: int, end: int) -> list[torch.Tensor]:
    """Losses of some steps, read after the last one of them."""
    return [learner.learn(step, learner.batches(windows, step)) for step in range(begin, end)]


def assert_same(found: Learner, wanted: Learner) -> None:
    of = [learner.state() for learner in (found, wanted)]
    assert of[0]["optimizer"]["state"].keys() == of[1]["optimizer"]["state"].keys()
    assert torch.equal(found.lr, wanted.lr)
    for name, x in of[1]["model"].items():
        assert torch.equal(of[0]["model"][name], x), name
    for name, x in (of[1]["averaged"] or {}).items():
        assert torch.equal(of[0]["averaged"][name], x), name
    for number, state in of[1]["optimizer"]["state"].items():
        for name, x in state.items():
            assert torch.equal(of[0]["optimizer"]["state"][number][name], x), (number, name)


@pytest.mark.parametrize(
    "changes", [{}, {"accumulate": 2}, {"attention": "dense", "ema": 0}, {"clip": 0, "modulate": "tokens"}], ids=str
)
def test_a_replayed_step_is_the_step(pictures: Path, changes: dict[str, Any]) -> None:
    wanted = small(warmup=STEPS, **changes)
    windows, tape = Windows(pictures, wanted.size), Tape()
    learners = [Learner(wanted, ALONE), Learner(wanted, ALONE, tape)]
    losses = [taught(learner, windows, 0, STEPS) for learner in learners]
    assert (tape.warm_ups, tape.captures, tape.replays) == (WARM_UPS, 1, STEPS - WARM_UPS)
    assert losses[1] == losses[0] and len({float(loss) for loss in losses[1]}) == STEPS
    assert_same(learners[1], learners[0])


def test_a_run_goes_on_from_its_checkpoint_with_a_graph_and_without(pictures: Path, tmp_path: Path) -> None:
    wanted = small(warmup=2 * STEPS)
    windows = Windows(pictures, wanted.size)
    plain, recorded = Learner(wanted, ALONE), Learner(wanted, ALONE, Tape())
    losses = taught(plain, windows, 0, 2 * STEPS)
    taught(recorded, windows, 0, STEPS)
    path = checkpoints.save(tmp_path, STEPS, recorded.state())
    tapes = [Tape(), Tape()]
    others = [Learner(wanted, ALONE), Learner(wanted, ALONE, tapes[0]), Learner(wanted, ALONE, tapes[1])]
    taught(others[2], windows, 0, WARM_UPS + 1)  # has recorded tensors that the checkpoint replaces
    for other in others:
        other.load(checkpoints.load(path, ALONE.device))
        assert taught(other, windows, STEPS, 2 * STEPS) == losses[STEPS:]
        assert_same(other, plain)
    assert [tape.captures for tape in tapes] == [1, 2]


def test_averages_are_those_of_torch(pictures: Path) -> None:
    wanted = small(ema=0.7)
    learner, windows = Learner(wanted, ALONE, Tape()), Windows(pictures, wanted.size)
    reference = AveragedModel(learner.model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    for step in range(STEPS):
        taught(learner, windows, step, step + 1)
        reference.update_parameters(learner.model)
    found = learner.state()["averaged"]
    assert found.keys() == reference.state_dict().keys()
    for name, x in reference.state_dict().items():
        assert torch.equal(found[name], x), name


def test_a_validation_between_replays_changes_nothing(pictures: Path) -> None:
    wanted = small()
    windows = Windows(pictures, wanted.size)
    learners = [Learner(wanted, ALONE), Learner(wanted, ALONE, Tape())]
    found = []
    for learner in learners:
        taught(learner, windows, 0, WARM_UPS + 1)
        found.append(learner.validate(windows.fixed(8)))
        learner.sample(1, 2, 0)
        found.append(taught(learner, windows, WARM_UPS + 1, STEPS))
    assert found[2:] == found[:2]


def test_the_host_waits_for_nothing_while_a_step_is_recorded(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = small()
    learner = Learner(wanted, ALONE, Tape())
    monkeypatch.setattr(learner, "loss", lambda run, batch: run(batch.given, batch.t).mean() + float(batch.t.sum()))
    windows = Windows(pictures, wanted.size)
    taught(learner, windows, 0, WARM_UPS)
    with pytest.raises(RuntimeError, match="the host waits for a number"):
        taught(learner, windows, WARM_UPS, WARM_UPS + 1)


def test_batches_of_another_shape_are_an_error() -> None:
    def batch(tokens: int) -> Batch:
        return Batch(torch.ones(1, tokens, 3), torch.ones(1), torch.ones(1, tokens, 3))

    def nothing(batches: Iterable[Batch]) -> None: ...

    step = Replayed(nothing, Tape())
    for _ in range(WARM_UPS + 1):
        step([batch(4)])
    with pytest.raises(ValueError, match=r"batch: expected \(1, 4, 3\), as recorded, got \(1, 1, 3\)"):
        step([batch(1)])
    with pytest.raises(ValueError, match="shorter"):
        step([])


@pytest.mark.parametrize(
    ("changes", "process", "said"),
    [
        ({}, ALONE, "without a GPU"),
        ({}, Process(torch.device("cuda"), 0, 2), "for several processes"),
        ({"checkpointing": True}, Process(torch.device("cuda")), "with checkpointing"),
    ],
)
def test_a_graph_that_cannot_be_had_is_an_error_and_auto_is_none(
    changes: dict[str, Any], process: Process, said: str
) -> None:
    assert graph_of(small(**changes), process) is None
    with pytest.raises(ValueError, match=f"cuda_graph: expected auto or false {said}, got true"):
        graph_of(small(cuda_graph=True, **changes), process)


def test_a_run_may_go_on_with_another_setting_of_the_graph() -> None:
    assert [small(cuda_graph=x).cuda_graph for x in ("auto", "true", "False", True)] == ["auto", True, False, True]
    assert settings.changed(small(), small(cuda_graph=False)) == []
    assert small().cuda_graph == "auto"
    with pytest.raises(SystemExit, match="cuda_graph: expected auto, true or false, got 'maybe'"):
        settings.checked({"cuda_graph": "maybe"})
