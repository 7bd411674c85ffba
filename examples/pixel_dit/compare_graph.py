"""Whether a replayed step is the step, on a GPU: the same losses and weights to the bit, and how long each takes.

    python examples/pixel_dit/compare_graph.py --attention llsa_l2 --batch 1

Twenty steps at 64×64 pixels on random windows, another one each, as they are and recorded; then the time of a step at
256×256. Ends with an error where bits differ. Attention has to be deterministic for this: a compiled spec is.
"""

import argparse
import gc
import sys

import numpy as np
import settings
import throughput
import torch
from learner import Learner
from settings import Settings
from train import process_of

COMPARED_STEPS = 20


class Noise:
    """Windows of random bytes."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def draw(self, seed: int, position: int) -> np.ndarray:
        return np.random.default_rng([seed, position]).integers(0, 256, (*self.size, 3), dtype=np.uint8)


def taught(wanted: Settings) -> dict[str, torch.Tensor]:
    """What some steps leave behind: losses, weights and averaged weights, by name."""
    learner, source = Learner(wanted, process_of(wanted.device)), Noise(wanted.size)
    losses = [learner.learn(step, learner.batches(source, step)) for step in range(COMPARED_STEPS)]
    found = {f"loss of step {step}": loss for step, loss in enumerate(losses)}
    found |= {f"weights {name}": x for name, x in learner.model.named_parameters()}
    found |= {f"averaged weights {name}": x for name, x in learner.best.named_parameters()}
    return {name: x.detach().clone() for name, x in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare steps that are replayed with steps that run as they are.")
    parser.add_argument("--timed", default="256", metavar="N", help="pixels of the step that is timed")
    settings.add_flags(parser, varied=("cuda_graph",))
    options = parser.parse_args()
    wanted = settings.from_flags(options)
    both = [wanted.model_copy(update={"cuda_graph": graph}) for graph in (True, False)]
    try:
        replayed, plain = (taught(one) for one in both)  # the first says if there can be none
    except ValueError as error:
        sys.exit(f"compare_graph.py: {error}")
    differ = [name for name, x in plain.items() if not torch.equal(x, replayed[name])]
    last = float(replayed[f"loss of step {COMPARED_STEPS - 1}"])
    print(f"{COMPARED_STEPS} steps, last loss {last:.6f}: {len(differ)} of {len(plain)} tensors differ {differ[:5]}")
    size = settings.checked({"size": options.timed}).size
    for one in both:
        gc.collect()
        row = throughput.measure(one.model_copy(update={"size": size}))
        took = (
            row["missing"] if "missing" in row else f"{row['step_ms']:.2f} ms, peak {row['peak_bytes'] / 2**30:.1f} GiB"
        )
        print(f"{size[0]}×{size[1]}, {'replayed' if one.cuda_graph else 'as it is'}: {took}")
    if differ:
        sys.exit("compare_graph.py: a replayed step gives other bits")


if __name__ == "__main__":
    main()
