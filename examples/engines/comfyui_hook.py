"""Sparse attention in ComfyUI: a node that patches a model, through `optimized_attention_override`.

    copy this file to ComfyUI/custom_nodes/llsa/__init__.py, write a spec, and put "LLSA attention" before the sampler

This is written from ComfyUI's code as it was on 1 December 2026, and was not run in a ComfyUI; tests run it against a
stand-in of the same signatures. `wrap_attn` of comfy/ldm/modules/attention.py (commit 05080f6) calls

    override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False,
             **more)

with q, k and v [B, N, H * D], or [B, H, N, D] with skip_reshape; `more` may hold scale, enable_gqa and
transformer_options. The result is [B, N, H * D], or [B, H, N, D] with skip_output_reshape. transformer_options has
`sigmas`, the noise of this step, `sample_sigmas`, that of all steps, and `block_index`, which begins at 0 again where
another kind of block does. `model_function_wrapper` (comfy/samplers.py, commit 311c014) is called with apply_model and
a dict of input, timestep, c and cond_or_uncond; c holds transformer_options and the text, c_crossattn [B, T, C].
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from llsa_gen.integrations import callable as engine

PICTURE = "llsa_picture"
"""The option that this file adds: the grid of patches, and how many tokens of text there are."""


class Override:
    """What takes the place of ComfyUI's attention: sparse over all patches of a picture, alone or with all text.

    Args:
        spec: what `llsa_gen.compile` takes.
        patch: pixels of the latent on a side of a patch: 2 for Flux and most other transformers.
        text: where such a model puts its text, "first" or "last".
        schedule: rules such as "dense for the first 4 steps", "dense for layers 0 and 1".
        min_tokens: below this many patches attention is dense; measured on the device unless given.
    """

    def __init__(
        self, spec: Any, patch: int = 2, text: str = "first", schedule: Any = (), min_tokens: int | None = None
    ) -> None:
        self.attend = engine(spec, text=text, schedule=schedule, min_tokens=min_tokens)
        self.patch = patch

    def __call__(
        self, func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None,
        attn_precision: Any = None, skip_reshape: bool = False, skip_output_reshape: bool = False, **more: Any,
    ) -> Tensor:  # fmt: skip
        """The override. What is masked, or attends to or from anything else, goes to `func` as it came."""
        options = more.get("transformer_options") or {}
        grid, texts = options.get(PICTURE, ((), 0))
        n_text = (q.shape[2] if skip_reshape else q.shape[1]) - math.prod(grid)
        if not grid or n_text not in (0, texts) or mask is not None or not q.shape == k.shape == v.shape:
            return func(
                q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape, **more,
            )  # fmt: skip
        if not skip_reshape:
            q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        o = self.attend(
            q, k, v, scale=more.get("scale"), grid=grid, n_text=n_text, layer=options.get("block_index"),
            step=step_of(options) if self.attend.schedule else None,
        )  # fmt: skip
        return o if skip_output_reshape else o.transpose(1, 2).flatten(2)

    def note(self, apply_model: Callable[..., Tensor], call: dict[str, Any]) -> Tensor:
        """The `model_function_wrapper`: says how many patches the picture has, and how many tokens the text."""
        conditions = dict(call["c"])
        grid = tuple(-(-size // self.patch) for size in call["input"].shape[-2:])
        text = conditions.get("c_crossattn")
        picture = (grid, 0 if text is None else text.shape[1])
        conditions["transformer_options"] = {**conditions.get("transformer_options", {}), PICTURE: picture}
        return apply_model(call["input"], call["timestep"], **conditions)


def step_of(options: dict[str, Any]) -> int | None:
    """The number of the step whose sigma this is; None where ComfyUI does not say."""
    sigmas, now = options.get("sample_sigmas"), options.get("sigmas")
    if sigmas is None or now is None:
        return None
    return int((sigmas.to(now.device) - now.flatten()[0]).abs().argmin())


class LLSAAttention:
    """The node."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (as ComfyUI calls it)
        return {
            "required": {
                "model": ("MODEL",),
                "spec": ("STRING", {"default": "pixels.yaml"}),
                "dense_steps": ("INT", {"default": 4, "min": 0}),
            }
        }

    def patch(self, model: Any, spec: str, dense_steps: int) -> tuple[Any]:
        """A clone of the model with the hook in it."""
        override = Override(spec, schedule=[f"dense for the first {dense_steps} steps"])
        patched = model.clone()
        if "model_function_wrapper" in patched.model_options:
            raise ValueError("model: expected one without a model_function_wrapper, which this node would replace")
        patched.set_model_unet_function_wrapper(override.note)
        options = patched.model_options.setdefault("transformer_options", {})
        patched.model_options["transformer_options"] = {**options, "optimized_attention_override": override}
        return (patched,)


NODE_CLASS_MAPPINGS = {"LLSAAttention": LLSAAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"LLSAAttention": "LLSA attention"}
