"""Lightning and accelerate train, save and load a model with the layer in it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from llsa_gen import Level, Spec, compile
from llsa_gen.nn import LLSAttention

os.environ["HF_HUB_OFFLINE"] = "1"
accelerate = pytest.importorskip("accelerate")
lightning = pytest.importorskip("lightning")

SPEC = Spec(name="trained", head_dim=8, levels=(Level(block=4, topk=2), Level(block=3, topk=2)))
STEPS = 6


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(LLSAttention(16, 2, SPEC, qk_norm=True, order=(5, 9)), nn.GELU(), nn.Linear(16, 1))


def batches() -> DataLoader[Any]:
    x = torch.randn(2 * STEPS, 45, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.mean(-1, keepdim=True).roll(1, 1)), batch_size=2)


def by_hand() -> nn.Module:
    """What a plain loop makes of it."""
    trained = model()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.mse_loss(trained(x), y).backward()
        optimizer.step()
    return trained


def same(x: nn.Module, y: nn.Module) -> bool:
    pairs = zip(x.state_dict().items(), y.state_dict().items(), strict=True)
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


def test_accelerate_trains_it_as_a_loop_does(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    own = model()
    trained, optimizer, loader = accelerator.prepare(own, torch.optim.AdamW(own.parameters(), lr=1e-2), batches())
    for x, y in loader:
        with accelerator.accumulate(trained):
            optimizer.zero_grad()
            accelerator.backward(nn.functional.mse_loss(trained(x), y))
            optimizer.step()
    unwrapped = accelerator.unwrap_model(trained)
    assert same(unwrapped, by_hand()) and not same(unwrapped, model())
    accelerator.save_model(trained, str(tmp_path))
    other = model()
    accelerate.load_checkpoint_in_model(other, str(tmp_path))
    assert same(other, unwrapped)


def test_accelerate_makes_it_without_memory_and_fills_it(tmp_path: Path) -> None:
    trained = by_hand()
    torch.save(trained.state_dict(), tmp_path / "weights.bin")
    with accelerate.init_empty_weights():
        empty = model()
    assert all(parameter.is_meta for parameter in empty.parameters())
    filled = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "weights.bin"), device_map={"": "cpu"})
    (x, _), *_ = batches()
    assert torch.equal(filled(x), trained(x))


class Lit(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.attend = model(), compile(SPEC).as_module()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.filterwarnings("ignore")  # Lightning's, of few workers and small batches
def test_lightning_trains_it_as_a_loop_does_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
                               "default_root_dir": tmp_path}  # fmt: skip
    lit = Lit()
    trainer = lightning.Trainer(max_epochs=1, **options)
    trainer.fit(lit, batches())
    assert same(lit.model, by_hand())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert same(Lit.load_from_checkpoint(tmp_path / "one.ckpt"), lit)
    lightning.Trainer(max_epochs=2, **options).fit(lit, batches(), ckpt_path=tmp_path / "one.ckpt")
    assert not same(lit.model, by_hand())
    (x, _), *_ = batches()
    rounded = lightning.Trainer(max_epochs=1, precision="bf16-mixed", **options)
    rounded.fit(Lit(), batches())
    assert torch.isfinite(lit.model(x)).all()
