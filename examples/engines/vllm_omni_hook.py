"""Sparse attention in vLLM-Omni: an attention backend for its diffusion models.

    from vllm_omni.diffusion.attention.backends import registry

    name = registry.DiffusionAttentionBackendEnum.FASTVIDEO_VSA  # whose place it takes; then select that name
    registry.register_diffusion_backend(name, "vllm_omni_hook.LLSABackend")

This is written from the wheel of vllm_omni 0.30.0, and was not run in it; tests run it against a stand-in of the same
signatures (vllm_omni/diffusion/attention/backends/abstract.py): AttentionImpl.__init__(num_heads, head_size,
softmax_scale, causal, num_kv_heads, prefix, qkv_layout, backend_kwargs, **more) and forward_cuda(query, key, value,
attn_metadata), of tensors [B, N, H, D]. AttentionMetadata has attn_mask and video_layout, whose prefix_len tokens stand
before those of latent_grid (frames, height, width); get_forward_context() has denoise_step_idx, the number of the step.
What publishes no video_layout is dense.
"""

import importlib
import os
import re
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llsa_gen.integrations import callable as engine

SPEC, SCHEDULE = "LLSA_SPEC", "LLSA_SCHEDULE"
"""Variables with the path of the spec, and with rules such as "dense for the first 4 steps; dense for layer 0"."""


class LLSAImpl:
    """One layer. Where vllm_omni is installed it is an AttentionImpl, by `LLSABackend.get_impl_cls`."""

    def __init__(
        self, num_heads: int, head_size: int, softmax_scale: float, causal: bool = False,
        num_kv_heads: int | None = None, prefix: str = "", qkv_layout: str | None = None,
        backend_kwargs: dict[str, Any] | None = None, **more: Any,
    ) -> None:  # fmt: skip
        if causal:
            raise ValueError(f"{prefix}: causal: expected False, got True: choose another backend for this layer")
        rules = [rule for rule in os.environ.get(SCHEDULE, "").split(";") if rule.strip()]
        given = {"spec": os.environ.get(SPEC), "schedule": rules, **(backend_kwargs or {})}
        self.attend = engine(given.pop("spec"), layout="BNHD", text="first", **given)
        self.scale = softmax_scale
        number = re.search(r"\.(\d+)\.", f".{prefix}.")
        self.layer = None if number is None else int(number[1])

    def forward_cuda(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Tensor:
        """[B, N, H, D] to the same. What has no grid, such as attention to text, is dense; a mask is refused."""
        for name in ("joint_query", "full_attn_spans", "packed_padding"):
            if getattr(attn_metadata, name, None) is not None:
                raise ValueError(f"{name}: expected None, got one: choose another backend for this model")
        mask = getattr(attn_metadata, "attn_mask", None)
        if mask is not None and not bool(mask.all()):
            raise ValueError("attn_mask: expected None, or one that is True for every token, got one that hides some")
        layout: Any = getattr(attn_metadata, "video_layout", None)
        grid = getattr(layout, "latent_grid", None)
        if grid is None or query.shape[1] != key.shape[1]:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=True).transpose(1, 2)
        return self.attend(
            query, key, value, scale=self.scale, grid=tuple(grid), n_text=layout.prefix_len, step=current_step(),
            layer=self.layer,
        )  # fmt: skip


def current_step() -> int | None:
    """The number of the denoising step; None outside of vllm_omni."""
    try:
        context = importlib.import_module("vllm_omni.diffusion.forward_context")
    except ImportError:
        return None
    return context.get_forward_context().denoise_step_idx if context.is_forward_context_available() else None


class LLSABackend:
    """The backend that vllm_omni asks."""

    accept_output_buffer = False
    supports_piecewise_spans = supports_paged_kv = supports_prefix_kv_slicing = False
    supported_platforms = ("cuda",)

    @staticmethod
    def get_name() -> str:
        return "LLSA"

    @staticmethod
    def get_impl_cls() -> type:
        try:
            base = importlib.import_module("vllm_omni.diffusion.attention.backends.abstract").AttentionImpl
        except ImportError:
            return LLSAImpl
        return type("LLSAImpl", (LLSAImpl, base), {})

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        return False

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Any; the spec says one, and a layer with another is refused when it is called."""
        return []
