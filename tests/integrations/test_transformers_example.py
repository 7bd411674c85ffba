"""The example of examples/transformers learns, sparsely."""

import registers


def test_it_learns() -> None:
    model, losses, right = registers.tune(steps=24, batch=8)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert right > 0.4  # 0.25 by chance
    counts = registers.llsa.report(model)
    assert counts.sparse == 2 * 25 and counts.dense == 0
