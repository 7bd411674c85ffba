"""`llsa_gen.nn.LLSAttention`: the layer is its parts, takes the place of a dense one, and survives what torch does."""

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import llsa_gen
from llsa_gen import Level, Spec, order
from llsa_gen.nn import LLSAttention

D, HEADS, WIDTH = 16, 2, 32
SPEC = Spec(name="layer", head_dim=D, levels=(Level(block=4, topk=2), Level(block=4, topk=1)))
ALL = Spec(name="everything", head_dim=D, levels=(Level(block=4, topk=64),), enrich="none")
"""Keeps every token, up to 256 of them: dense attention."""
GRID, FIRST, LAST = (6, 8), 1, 2
TOKENS = FIRST + 48 + LAST


def tables(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    turned = torch.linspace(0, 5, tokens)[:, None] * torch.linspace(1, 0.1, D // 2).repeat(2)
    return turned.cos(), turned.sin()


def layer(spec: Spec = SPEC, **more: Any) -> LLSAttention:
    """One with everything, the same in every call; biases and norms are none that nobody would notice."""
    torch.manual_seed(0)
    options = {"qk_norm": True, "rotary": tables(), "order": GRID, "globals_first": FIRST, "globals_last": LAST}
    made = LLSAttention(WIDTH, HEADS, spec, **{**options, **more})
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name != "in_proj_weight" and name != "out_proj.weight":
                parameter += torch.randn_like(parameter) * 0.3
    return made


def tokens(count: int = TOKENS, seed: int = 1, **more: Any) -> Tensor:
    return torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(seed)).to(**more)


def gradients(module: Any, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *parameters])]


def close(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- what is computed ----------------------------------------------------------------------------------------------


def by_hand(module: LLSAttention, x: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """The layer in small steps: q, k and v are rotated where they stand, then the image's are permuted."""
    bias = module.in_proj_bias
    q, k, v = (
        nn.functional.linear(x, weight, None if bias is None else bias.chunk(3)[i]).unflatten(-1, (HEADS, D)).mT.mT
        for i, weight in enumerate(module.in_proj_weight.chunk(3))
    )
    if module.q_norm is not None and module.k_norm is not None:
        q, k = (
            x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
            for x, norm in ((q, module.q_norm), (k, module.k_norm))
        )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if rotary is not None:
        cos, sin = rotary
        half = D // 2
        q, k = (
            torch.cat(
                [
                    x[..., :half] * cos[:, :half] - x[..., half:] * sin[:, :half],
                    x[..., half:] * cos[:, half:] + x[..., :half] * sin[:, half:],
                ],
                -1,
            )
            for x in (q, k)
        )
    first, last = module.globals_first, module.globals_last
    own = slice(first, x.shape[1] - last)
    places = order.grid(GRID, SPEC)

    def moved(x: Tensor, change: Any) -> Tensor:
        return torch.cat([x[:, :, :first], change(x[:, :, own]), x[:, :, own.stop :]], 2)

    o = llsa_gen.joint_attention(
        module.attention, *(moved(x, places.apply) for x in (q, k, v)), globals_first=first, globals_last=last,
        global_mask=mask, scale=module.scale,
    )  # fmt: skip
    return module.out_proj(moved(o, places.restore).transpose(1, 2).flatten(2))


MASK = torch.tensor([[True, False, True], [True, True, True]])


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, None),
        ({}, MASK),
        ({"qk_norm": False, "scale": 0.5}, None),
        ({"rotary": None, "bias": False}, None),
        ({"order": order.grid(GRID, SPEC), "globals_first": 0, "globals_last": 3}, MASK),
    ],
    ids=["all", "masked", "plain", "no tables", "an order"],
)
def test_it_is_its_parts(options: dict[str, Any], mask: Tensor | None) -> None:
    module, x = layer(**options), tokens()
    parameters = [*module.parameters()]
    rotary = options.get("rotary", tables())
    found = gradients(lambda x: module(x, global_mask=mask), x, parameters)
    wanted = gradients(lambda x: by_hand(module, x, mask, rotary), x, parameters)
    assert all(map(close, found, wanted))
    assert all(one.any() for one in found)


def test_tables_may_come_with_the_tokens_and_get_gradients() -> None:
    x, (cos, sin) = tokens(), tables()
    module, bare = layer(), layer(rotary=None)
    assert torch.equal(bare(x, rotary=(cos, sin)), module(x))
    assert torch.equal(module(x, rotary=(torch.ones_like(cos), torch.zeros_like(sin))), bare(x)), "instead, not besides"
    cos.requires_grad_()
    bare(x, rotary=(cos, sin)).sum().backward()
    assert cos.grad is not None and cos.grad.any(1).all()


def test_what_is_masked_may_hold_anything() -> None:
    module, x = layer(), tokens()
    before = module(x, global_mask=MASK)
    x[0, -LAST] = float("nan")
    after = module(x, global_mask=MASK)
    assert torch.equal(before, after)
    assert torch.equal(after[0, -LAST], module.out_proj.bias)


# ---- like a dense layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_seed_gives_the_parameters_of_torch_and_state_dicts_fit_both_ways(bias: bool) -> None:
    torch.manual_seed(3)
    dense = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True)
    torch.manual_seed(3)
    module = LLSAttention(WIDTH, HEADS, SPEC, bias=bias, order=GRID, rotary=tables(48))
    wanted, found = dense.state_dict(), module.state_dict()
    assert [*found] == [*wanted] and all(torch.equal(found[name], wanted[name]) for name in wanted)
    torch.manual_seed(4)
    other = LLSAttention(WIDTH, HEADS, SPEC, bias=bias)
    assert not torch.equal(other.in_proj_weight, dense.in_proj_weight)
    other.load_state_dict(wanted, strict=True)
    dense.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(other.in_proj_weight, dense.in_proj_weight)
    assert torch.equal(other.out_proj.weight, dense.out_proj.weight)


@pytest.mark.parametrize("more", [{}, {"order": GRID, "globals_first": FIRST, "globals_last": LAST}])
@pytest.mark.parametrize("bias", [True, False])
def test_from_dense_with_everything_kept_is_the_dense_layer(bias: bool, more: dict[str, Any]) -> None:
    torch.manual_seed(3)
    dense = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True).eval()
    if dense.in_proj_bias is not None:
        nn.init.normal_(dense.in_proj_bias)
        nn.init.normal_(dense.out_proj.bias)
    dense.out_proj.weight.requires_grad_(False)
    state = torch.get_rng_state()
    module = LLSAttention.from_dense(dense, ALL, **more)
    assert torch.equal(state, torch.get_rng_state())
    assert not module.training and LLSAttention.from_dense(dense.train(), ALL).training
    x = tokens()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert [name for name, parameter in module.named_parameters() if not parameter.requires_grad] == ["out_proj.weight"]
    found = gradients(module, x, trained)
    wanted = gradients(lambda x: dense(x, x, x)[0], x, [p for p in dense.parameters() if p.requires_grad])
    assert all((a - b).norm() <= 1e-5 * b.norm() + 1e-6 for a, b in zip(found, wanted, strict=True))
    assert (found[0] - wanted[0]).abs().max() <= 1e-5
    with torch.no_grad():
        module.in_proj_weight.zero_()
    assert dense.in_proj_weight.all(), "weights are copies"


def test_from_dense_keeps_dtype_and_device_and_says_that_the_batch_comes_first() -> None:
    dense = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"takes \[N, B, embed_dim\], this one \[B, N, embed_dim\]"):
        module = LLSAttention.from_dense(dense, ALL, qk_norm=True)
        plain = LLSAttention.from_dense(copy.deepcopy(dense).float(), ALL)
    assert {x.dtype for x in module.parameters()} == {torch.bfloat16}
    assert module.q_norm is not None and torch.equal(module.q_norm.weight, torch.ones(D).bfloat16())
    x = tokens().bfloat16()
    wanted = dense.float()(*[x.float().transpose(0, 1)] * 3)[0].transpose(0, 1)
    assert close(plain(x.float()), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_meta = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, device="meta")
        assert LLSAttention.from_dense(on_meta, ALL, order=GRID).in_proj_weight.is_meta


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kdim": 8}, "kdim 32, got 8"),
        ({"vdim": 8}, "vdim 32, got 8"),
        ({"add_bias_kv": True}, "add_bias_kv False, got True"),
        ({"add_zero_attn": True}, "add_zero_attn False, got True"),
        ({"dropout": 0.1}, "dropout 0.0, got 0.1"),
    ],
)
def test_a_dense_layer_that_does_more_is_refused(options: dict[str, Any], message: str) -> None:
    dense = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
    with pytest.raises(ValueError, match=f"module: expected {message}, which LLSAttention does not have"):
        LLSAttention.from_dense(dense, SPEC)
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.MultiheadAttention, got Linear"):
        LLSAttention.from_dense(nn.Linear(2, 2), SPEC)  # type: ignore[arg-type]


def test_a_dense_layer_with_other_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"embed_dim: expected .* head_dim 16 of spec layer, got 32, a head_dim of 8"):
        LLSAttention.from_dense(nn.MultiheadAttention(WIDTH, 4, batch_first=True), SPEC)


# ---- what torch does with modules ----------------------------------------------------------------------------------


def test_compiled_for_all_lengths(fresh_dynamo: None) -> None:
    module = layer(order=None, rotary=None)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for count in (40, 55):
            assert close(compiled(tokens(count)), module(tokens(count)))


def test_compiled_with_everything(fresh_dynamo: None) -> None:
    module = layer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    pairs = [gradients(one, tokens(), [*module.parameters()]) for one in (compiled, module)]
    assert all(map(close, *pairs))
    mask, rotary = MASK, tables()
    assert close(compiled(tokens(), global_mask=mask, rotary=rotary), module(tokens(), global_mask=mask, rotary=rotary))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exported_for_any_length(strict: bool) -> None:
    module = layer(order=None, rotary=None)
    shapes = {"x": {1: torch.export.Dim("n", min=8)}}
    program = torch.export.export(module, (tokens(40),), dynamic_shapes=shapes, strict=strict).module()
    assert close(program(tokens(71)), module(tokens(71)))
    whole, batch = layer(), torch.export.Dim("b")
    program = torch.export.export(whole, (tokens(),), dynamic_shapes={"x": {0: batch}}, strict=strict).module()
    x = torch.cat([tokens(), tokens(seed=2)])
    assert close(program(x), whole(x))


def test_autocast_and_checkpoints() -> None:
    module, x = layer(), tokens()
    parameters = [*module.parameters()]
    wanted = gradients(module, x, parameters)
    for reentrant in (True, False):
        module.zero_grad()
        own = x.clone().requires_grad_()
        y = checkpoint(module, own, use_reentrant=reentrant)
        assert isinstance(y, Tensor)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
        found = [y, own.grad, *(parameter.grad for parameter in parameters)]
        assert all(a is not None and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")  # torch has one for norms of two dtypes
        y = module(x)
    assert y.dtype == torch.bfloat16 and (y - wanted[0]).norm() < 3e-2 * wanted[0].norm()
    assert {grad.dtype for grad in torch.autograd.grad(y.sum(), parameters)} == {torch.float32}


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved],
                         ids=["deepcopy", "pickle", "save"])  # fmt: skip
def test_copies(way: Any) -> None:
    module, x = layer(), tokens()
    other = way(module)
    assert torch.equal(other(x), module(x)) and str(other) == str(module)
    assert other.attention is module.attention, "compiled from the same spec"
    with torch.no_grad():
        other.in_proj_weight.zero_()
    assert module.in_proj_weight.all()


def test_state_dict_and_functional_call_and_hooks() -> None:
    module, x = layer(), tokens()
    other = LLSAttention(WIDTH, HEADS, SPEC, qk_norm=True, rotary=tables(), order=GRID, globals_first=FIRST,
                         globals_last=LAST)  # fmt: skip
    assert not torch.equal(other(x), module(x))
    wanted = module(x)
    assert torch.equal(torch.func.functional_call(other, module.state_dict(), (x,)), wanted)
    assert not torch.equal(other(x), wanted)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), wanted)
    seen: list[Any] = []
    other.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    other.register_forward_hook(lambda *_: wanted * 2)
    other.register_full_backward_hook(lambda _, grad_input, grad_output: seen.append(grad_output[0].shape))
    y = other(x.requires_grad_())
    assert torch.equal(y, wanted * 2) and seen == [x.shape]


def test_what_is_printed() -> None:
    lines = str(layer(scale=0.5)).splitlines()
    assert lines[1].strip() == (
        "32, num_heads=2, spec='layer', globals_first=1, globals_last=2, order=(6, 8), rotary=True, scale=0.5"
    )
    assert "q_norm" in str(layer()) and "q_norm" not in str(layer(qk_norm=False))
    module = LLSAttention(WIDTH, HEADS, SPEC, bias=False, order=order.grid(GRID, SPEC))
    assert module.extra_repr() == "32, num_heads=2, spec='layer', bias=False, order=48 tokens"


def test_made_on_meta() -> None:
    x = tokens()
    with torch.device("meta"):
        module = LLSAttention(WIDTH, HEADS, SPEC, qk_norm=True, order=GRID, globals_first=FIRST, globals_last=LAST)
    assert {y.device.type for y in (*module.parameters(), *module.buffers())} == {"meta"}
    assert module(x.to("meta")).shape == x.shape
    wanted = layer(rotary=None)
    assigned = copy.deepcopy(module)
    module.to_empty(device="cpu").load_state_dict(wanted.state_dict())
    assert torch.equal(module(x), wanted(x)), "the order was made again"
    assigned.load_state_dict(wanted.state_dict(), assign=True)
    assert torch.equal(assigned(x), wanted(x))
    # nothing that to_empty left is left by reset_parameters
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.constant_(parameter, float("nan"))
    module.reset_parameters()
    fresh = LLSAttention(WIDTH, HEADS, SPEC, qk_norm=True).state_dict()
    found = module.state_dict()
    assert all(y.isfinite().all() for y in found.values())
    assert all(torch.equal(found[name], y) for name, y in fresh.items() if name.endswith(("bias", "norm.weight")))


def test_tables_keep_their_dtype_and_share_memory() -> None:
    module = LLSAttention(WIDTH, HEADS, SPEC, qk_norm=True, rotary=tables(48), order=GRID, dtype=torch.bfloat16)
    assert {x.dtype for x in module.parameters()} == {torch.bfloat16}
    assert module.cos is not None and module.cos.dtype == torch.float32
    assert module(tokens(48).bfloat16()).dtype == torch.bfloat16
    again = module.float().bfloat16()
    assert again.cos is not None and again.cos.dtype == torch.float32
    assert torch.equal(again.cos, tables(48)[0][order.grid(GRID, SPEC).permutation])
    assert all(x.is_shared() for x in module.share_memory().buffers())


def test_every_parameter_is_used_and_buffers_are_not_saved() -> None:
    module = layer()
    assert len([*module.buffers()]) == 4
    module(tokens()).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert {*module.state_dict()} == {name for name, _ in module.named_parameters()}


def test_an_order_costs_one_index_select_each_way() -> None:
    module = layer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        module(tokens())
    events = [event for event in profile.events() or [] if event.name == "aten::index_select"]
    own = [event.input_shapes[0] for event in events if event.cpu_parent is None]  # those of the operator are inside it
    assert own == [[2, TOKENS, WIDTH], [2, TOKENS, HEADS, D]]


# ---- what is refused -----------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"embed_dim": 64}, ValueError,
     r"embed_dim: expected num_heads \* head_dim, 2 \* 16 = 32, .* spec layer, got 64, a head_dim of 32"),
    ({"embed_dim": 33}, ValueError, "got 33, a head_dim of 16.5"),
    ({"num_heads": 0}, ValueError, "num_heads: expected an integer of at least 1, got 0"),
    ({"embed_dim": 32.0}, TypeError, "embed_dim: expected an integer of at least 1, got float"),
    ({"globals_first": -1}, ValueError, "globals_first: expected an integer of at least 0, got -1"),
    ({"globals_last": True}, TypeError, "globals_last: expected an integer of at least 0, got bool"),
    ({"order": "6x8"}, TypeError, "shape: expected 1 or more integers"),
    ({"rotary": tables()[0]}, TypeError, r"rotary: expected \(cos, sin\), floats \[N, 16\] each, got Tensor"),
    ({"rotary": (tables()[0], tables(7)[0])}, ValueError, r"rotary: .* here \[51, 16\], got shape \[7, 16\]"),
    ({"rotary": tables(50), "order": GRID}, ValueError, r"rotary: .* here \[48, 16\], got shape \[50, 16\]"),
    ({"rotary": (torch.zeros(3, 16).int(),) * 2}, TypeError, "rotary: .*, got torch.int32"),
    ({"order": order.grid(GRID, SPEC, device="meta")}, ValueError, "order: expected tensors with values"),
    ({"rotary": tuple(x.to("meta") for x in tables())}, ValueError, "rotary: expected tensors with values"),
    ({"spec": {"name": "x"}}, llsa_gen.LlsaGenError, "head_dim"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_arguments_that_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LLSAttention(**{"embed_dim": WIDTH, "num_heads": HEADS, "spec": SPEC, **change})


def test_pairs_need_an_even_head() -> None:
    odd = Spec(name="odd", head_dim=9, levels=(Level(block=4, topk=2),))
    with pytest.raises(ValueError, match="head_dim must be even, got 9"):
        LLSAttention(18, 2, odd, rotary=(torch.ones(3, 9), torch.ones(3, 9)))


INPUTS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (None, {}, TypeError, r"x: expected a tensor \[B, N, 32\], got NoneType"),
    (torch.zeros(51, 32), {}, ValueError, r"x: expected shape \[B, N, 32\], got \[51, 32\]"),
    (torch.zeros(2, 51, 31), {}, ValueError, r"x: expected shape \[B, N, 32\], got \[2, 51, 31\]"),
    (tokens(50), {}, ValueError, "x: expected 48 tokens in the order and 3 global ones, got 50"),
    (tokens(), {"kv": tokens()}, ValueError, "kv: expected None, for LLSAttention is self-attention"),
    (tokens(), {"key_padding_mask": torch.ones(2, 51)}, ValueError, "key_padding_mask: .* image tokens have no mask"),
    (tokens(), {"global_mask": torch.ones(2, 51).bool()}, ValueError, r"global_mask: .* here \[2, 3\], got \[2, 51\]"),
    (tokens(), {"rotary": tables(50)}, ValueError, r"rotary: .* here \[51, 16\], got shape \[50, 16\]"),
    (tokens(), {"need_weights": True}, TypeError, "need_weights"),
]


@pytest.mark.parametrize(("x", "more", "error", "message"), INPUTS, ids=[message for *_, message in INPUTS])
def test_inputs_that_are_refused(x: Any, more: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer()(x, **more)


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="x: expected at least 3 tokens, the global ones, got 2"):
        layer(order=None, rotary=None)(tokens(2))
    with pytest.raises(ValueError, match=r"rotary: .* here \[40, 16\], got shape \[51, 16\]"):
        layer(order=None)(tokens(40))
    assert layer(order=None, rotary=None)(tokens(3)).shape == (2, 3, WIDTH), "an image of no tokens"
