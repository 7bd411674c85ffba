"""The hooks of examples/engines, against stand-ins of the signatures that ComfyUI and vLLM-Omni document."""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import comfyui_hook
import pytest
import torch
import vllm_omni_hook
from tiny_transformers import ALL, FEW, D, error, randn
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from llsa_gen.integrations import callable as engine

HEADS, TEXT = 2, 5


def wrap_attn(func: Any) -> Any:
    """ComfyUI's, as far as the hook sees it: without containers and preferred functions."""

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        options = kwargs.get("transformer_options")
        if "_inside_attn_wrapper" not in kwargs:
            kwargs["_inside_attn_wrapper"] = True
            if options is not None and "optimized_attention_override" in options:
                return options["optimized_attention_override"](func, *args, **kwargs)
        return func(*args, **kwargs)

    return wrapper


@wrap_attn
def optimized_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, attn_precision: Any = None,
    skip_reshape: bool = False, skip_output_reshape: bool = False, **kwargs: Any,
) -> Tensor:  # fmt: skip
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    o = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"))
    return o if skip_output_reshape else o.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Joint attention over text and patches, text first, and cross-attention to the text."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * D, 3 * HEADS * D)

    def forward(self, text: Tensor, image: Tensor, mask: Any, options: Any) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(torch.cat([text, image], 1)).chunk(3, -1)
        x = optimized_attention(q, k, v, HEADS, mask=mask, transformer_options=options)
        heads = (y.unflatten(2, (HEADS, D)).transpose(1, 2) for y in (q, k, v))
        x = x + optimized_attention(*heads, HEADS, mask=mask, skip_reshape=True, transformer_options=options)
        text, image = x[:, :TEXT], x[:, TEXT:]
        image = image + optimized_attention(image, text, text, HEADS, transformer_options=options)
        return text, image


class Patcher:
    """A ModelPatcher with a transformer of two blocks over patches of 2×2."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.embed = nn.Conv2d(4, HEADS * D, 2, 2)
        self.model_options: dict[str, Any] = {}

    def clone(self) -> "Patcher":
        other = copy.copy(self)
        other.model_options = dict(self.model_options)
        return other

    def set_model_unet_function_wrapper(self, wrapper: Any) -> None:
        self.model_options["model_function_wrapper"] = wrapper

    def apply_model(
        self, x: Tensor, t: Tensor, c_crossattn: Tensor, transformer_options: Any, mask: Any = None
    ) -> Tensor:
        image, text = self.embed(x).flatten(2).mT, c_crossattn
        for index, block in enumerate(self.blocks):
            transformer_options["block_index"] = index
            text, image = block(text, image, mask, transformer_options)
        return image

    def sample(self, steps: int = 3, **more: Any) -> list[Tensor]:
        sigmas, results = torch.linspace(1, 0, steps + 1), []
        for sigma in sigmas[:-1]:
            options = {**self.model_options.get("transformer_options", {})}
            options |= {"sigmas": sigma[None], "sample_sigmas": sigmas}
            c = {"c_crossattn": randn(1, TEXT, HEADS * D), "transformer_options": options, **more}
            x, t = randn(1, 4, 12, 16, seed=3), sigma[None]
            wrapper = self.model_options.get("model_function_wrapper")
            with torch.no_grad():
                if wrapper is None:
                    results.append(self.apply_model(x, t, **c))
                else:
                    call = {"input": x, "timestep": t, "c": c, "cond_or_uncond": [0]}
                    results.append(wrapper(self.apply_model, call))
        return results


def patched(spec: Any, **more: Any) -> tuple[Patcher, Any]:
    override = comfyui_hook.Override(spec, min_tokens=0, **more)
    model = Patcher()
    model.set_model_unet_function_wrapper(override.note)
    model.model_options["transformer_options"] = {"optimized_attention_override": override}
    return model, override


def test_comfyui_is_native_where_all_is_kept() -> None:
    model, override = patched(ALL)
    for found, wanted in zip(model.sample(), Patcher().sample(), strict=True):
        assert 0 < error(found, wanted) < 1e-5
    counts = override.attend.report()
    assert counts.sparse == 3 * 2 * 2, "both calls of joint attention; cross-attention is ComfyUI's own"
    assert {row.tokens for row in counts.rows} == {f"48 + {TEXT} text"}


def test_comfyui_keeps_to_the_schedule() -> None:
    model, override = patched(FEW, schedule=["dense for the first 2 steps", "dense for layer 1"])
    first, second, third = model.sample()
    wanted = Patcher().sample()
    assert torch.equal(first, wanted[0]) and torch.equal(second, wanted[1]) and not torch.equal(third, wanted[2])
    assert override.attend.report().sparse == 2


def test_comfyui_leaves_masks_and_other_sequences_alone() -> None:
    model, override = patched(FEW)
    mask = torch.ones(TEXT + 48, TEXT + 48, dtype=torch.bool).tril()
    assert all(map(torch.equal, model.sample(mask=mask), Patcher().sample(mask=mask)))
    assert override.attend.report().rows == ()


def test_the_node_patches_a_clone(tmp_path: Any) -> None:
    (tmp_path / "spec.yaml").write_text("name: few\nhead_dim: 16\nlevels:\n  - {block: 4, topk: 2}\n")
    model = Patcher()
    (clone,) = comfyui_hook.LLSAAttention().patch(model, str(tmp_path / "spec.yaml"), 1)
    assert model.model_options == {} and "optimized_attention_override" in clone.model_options["transformer_options"]
    with pytest.raises(ValueError, match="expected one without a model_function_wrapper"):
        comfyui_hook.LLSAAttention().patch(clone, str(tmp_path / "spec.yaml"), 1)


@dataclass
class Layout:
    """vllm_omni's VideoTokenLayout."""

    prefix_len: int | None = None
    latent_grid: tuple[int, int, int] | None = None


@dataclass
class Metadata:
    """vllm_omni's AttentionMetadata, as far as the hook reads it."""

    attn_mask: Tensor | None = None
    joint_query: Tensor | None = None
    full_attn_spans: Any = None
    packed_padding: Any = None
    video_layout: Layout | None = None


def layer(spec: Any, **more: Any) -> Any:
    kind = vllm_omni_hook.LLSABackend.get_impl_cls()
    return kind(
        num_heads=HEADS, head_size=D, softmax_scale=0.2, causal=False, num_kv_heads=1, prefix="blocks.3.attn",
        qkv_layout=None, backend_kwargs={"spec": spec, "min_tokens": 0, **more}, role="self", backend_explicit=True,
    )  # fmt: skip


VIDEO = Metadata(video_layout=Layout(TEXT, (2, 4, 6)))


def rows() -> tuple[Tensor, Tensor, Tensor]:
    return randn(1, TEXT + 48, HEADS, D), randn(1, TEXT + 48, 1, D, seed=2), randn(1, TEXT + 48, 1, D, seed=3)


def test_vllm_omni_is_native_where_all_is_kept() -> None:
    q, k, v = (x.transpose(1, 2) for x in rows())
    wanted = scaled_dot_product_attention(q, k, v, scale=0.2, enable_gqa=True).transpose(1, 2)
    made = layer(ALL)
    assert 0 < error(made.forward_cuda(*rows(), VIDEO), wanted) < 1e-5
    assert made.attend.report().rows[0].layer == "layer 3"
    assert torch.equal(layer(FEW).forward_cuda(*rows(), Metadata()), wanted), "nothing says where the video is"


def test_vllm_omni_knows_video_and_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = engine(FEW, layout="BNHD", min_tokens=0)(*rows(), scale=0.2, grid=(2, 4, 6), n_text=TEXT)
    assert torch.equal(layer(FEW).forward_cuda(*rows(), VIDEO), wanted)
    scheduled = layer(FEW, schedule=["dense for the first 2 steps"])
    for step, sparse in ((1, 0), (2, 1)):
        monkeypatch.setattr(vllm_omni_hook, "current_step", lambda step=step: step)
        scheduled.forward_cuda(*rows(), VIDEO)
        assert scheduled.attend.report().sparse == sparse
    monkeypatch.setattr(vllm_omni_hook, "current_step", lambda: None)
    with pytest.raises(ValueError, match="step: expected an integer"):
        scheduled.forward_cuda(*rows(), VIDEO)


def test_vllm_omni_refuses() -> None:
    mask = torch.ones(1, TEXT + 48, dtype=torch.bool)
    layer(FEW).forward_cuda(*rows(), Metadata(attn_mask=mask, video_layout=VIDEO.video_layout))
    mask[0, -1] = False
    with pytest.raises(ValueError, match="attn_mask: expected None"):
        layer(FEW).forward_cuda(*rows(), Metadata(attn_mask=mask))
    with pytest.raises(ValueError, match="packed_padding: expected None"):
        layer(FEW).forward_cuda(*rows(), Metadata(packed_padding=1))
    with pytest.raises(ValueError, match=r"grid: expected 48 patches beside 5 of text, got \[2, 4, 5\]"):
        layer(FEW).forward_cuda(*rows(), Metadata(video_layout=Layout(TEXT, (2, 4, 5))))
    with pytest.raises(ValueError, match=r"blocks\.0: causal: expected False"):
        vllm_omni_hook.LLSAImpl(1, D, 1.0, causal=True, prefix="blocks.0")
