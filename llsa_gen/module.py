"""A compiled operator as a part of a model: a torch module without parameters, with hooks of its own.

`compile` gives everybody the same operator for a spec, so what belongs to one model, such as hooks, is not put there.
"""

from typing import Any

from torch import Tensor, nn

__all__ = ["AttentionModule"]


class AttentionModule(nn.Module):
    """Calls an operator that `compile` gave: `attention.as_module()` makes a new one each time.

    Its state dict is empty, and nothing moves with it. Copies call the same operator; pickles, `torch.save` of a whole
    model and processes that are spawned compile it again from its spec, or find it in the store. A call takes one or
    two microseconds longer than that of the operator.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """o, or (o, lse) with return_lse=True: what the operator gives for q, k, v [B, H, N, D] and its options."""
        return self.attention(q, k, v, **options)

    def select(self, q: Tensor, k: Tensor, *, query_offset: int = 0) -> tuple[Tensor, ...]:
        """What it attends to: kept key tokens of each level, finest first."""
        return self.attention.select(q, k, query_offset=query_offset)

    @property
    def spec(self) -> Any:
        """The spec that the operator was compiled from."""
        return self.attention.spec

    def extra_repr(self) -> str:
        spec = self.spec
        levels = ", ".join(f"{level.block}: {level.topk}" for level in spec.levels)
        return f"{spec.name}, head_dim={spec.head_dim}, block: topk {levels}"
