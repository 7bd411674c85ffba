"""Which pixels belong to a small disc and which to a large one: a transformer over patches, trained by Lightning.

    pip install lightning
    python examples/lightning/segment.py

Pictures are made up here: 32×32 pixels with discs that are equally bright, under noise. A patch of 2×2 pixels is a
token, so that there are 16×16 = 256 of them, and sees too little to tell the one kind from the other: it has to look
around. What is not usual for Lightning is in `Block`, and in the line of `Segmenter` that permutes.
"""

import argparse
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import llsa_gen
from llsa_gen.nn import LLSAttention

SPEC = llsa_gen.load({"name": "segment", "head_dim": 16, "levels": [{"block": 16, "topk": 6}, {"block": 4, "topk": 4}]})
SIZE, PATCH, WIDTH = 32, 2, 64
ROWS = SIZE // PATCH
CLASSES = 3  # background, small, large


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Pictures [1, SIZE, SIZE] and the class of each pixel [SIZE, SIZE]: number `at` is always the same one."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + at)
        y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        classes = torch.zeros(SIZE, SIZE, dtype=torch.long)
        for kind, least in ((2, 7), *[(1, 2)] * 6):  # about as many pixels of each kind
            row, column = torch.randint(SIZE, (2,), generator=generator)
            radius = least + torch.rand(1, generator=generator)
            classes[(y - row) ** 2 + (x - column) ** 2 <= radius**2] = kind
        noise = torch.randn(SIZE, SIZE, generator=generator)
        return ((classes > 0) + 0.2 * noise)[None], classes


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a residual: tokens [B, N, WIDTH] to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = LLSAttention(WIDTH, WIDTH // SPEC.head_dim, SPEC, qk_norm=True)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norm_attention, self.norm_perceptron = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.perceptron(self.norm_perceptron(x))


class Segmenter(lightning.LightningModule):
    """Pictures [B, 1, SIZE, SIZE] to logits of the classes [B, CLASSES, SIZE, SIZE]."""

    def __init__(self, rate: float = 4e-3, depth: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.rate = rate
        order = llsa_gen.order.grid((ROWS, ROWS), SPEC)
        self.embed = nn.Conv2d(1, WIDTH, 3 * PATCH, stride=PATCH, padding=PATCH)
        self.positions = nn.Parameter(torch.randn(ROWS * ROWS, WIDTH) * 0.02)
        # all blocks share one order of the tokens, in front of the first and behind the last
        self.blocks = llsa_gen.order.Ordered(nn.Sequential(*(Block() for _ in range(depth))), order, dim=1)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES * PATCH**2))

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.embed(pictures).flatten(2).mT + self.positions  # [B, ROWS * ROWS, WIDTH], row by row
        x = self.head(self.blocks(x)).mT.unflatten(2, (ROWS, ROWS))
        return nn.functional.pixel_shuffle(x, PATCH)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        pictures, classes = batch
        loss = nn.functional.cross_entropy(self(pictures), classes)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Among the pixels of each kind of disc, the share for which that kind gets the higher score."""
        pictures, classes = batch
        found = self(pictures)[:, 1:].argmax(1) + 1
        for kind in (1, 2):
            self.log(f"right_{kind}", (found == kind)[classes == kind].float().mean(), batch_size=len(pictures))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(steps: int = 200, batch: int = 8, **options: Any) -> tuple[Segmenter, float]:
    """The trained model, and of the discs in new pictures the share that is right, as the mean over both kinds."""
    lightning.seed_everything(0)
    model = Segmenter()
    trainer = lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, **options)
    trainer.fit(model, DataLoader(Pictures(steps * batch, seed=1), batch_size=batch))
    (scores,) = trainer.validate(model, DataLoader(Pictures(64, seed=2), batch_size=64), verbose=False)
    return model, (scores["right_1"] + scores["right_2"]) / 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a segmenter of small and large discs with Lightning.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precision", default="32-true", help="what Lightning calls it, such as bf16-mixed")
    chosen = parser.parse_args()
    _, right = train(chosen.steps, precision=chosen.precision)
    print(f"{right:.0%} of the pixels of discs right; 50% by chance")
