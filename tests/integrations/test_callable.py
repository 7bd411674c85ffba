"""`llsa_gen.integrations.callable`: the contract that engines ask for, its schedule, and what it refuses."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo
from tiny_transformers import ALL, FEW, D, error, randn
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import llsa_gen
import llsa_gen.integrations
from llsa_gen import order
from llsa_gen.integrations import callable as engine
from llsa_gen.integrations.schedule import Rule, rules

GRID, TEXT = (6, 8), 3


def tensors(kv_heads: int = 4, text: int = TEXT) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(2, heads, text + 48, D) for heads in (4, kv_heads, kv_heads)]
    q, k, v = (randn(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return q, k, v


def turned(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def test_it_is_where_the_documents_say() -> None:
    assert llsa_gen.integrations.callable is engine
    with pytest.raises(AttributeError, match="no attribute 'engines_'"):
        getattr(llsa_gen.integrations, "engines_")  # noqa: B009


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
@pytest.mark.parametrize("text", ["first", "last"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_what_keeps_everything_is_dense_attention(layout: str, text: str, kv_heads: int) -> None:
    fn = engine(ALL, layout=layout, text=text, min_tokens=0)
    q, k, v = (x.requires_grad_() for x in tensors(kv_heads))
    wanted = scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    given = turned(q, k, v) if layout == "BNHD" else (q, k, v)
    o = fn(*given, scale=0.3, is_causal=False, grid=GRID, n_text=TEXT, step=0, layer=0)
    o = o.transpose(1, 2) if layout == "BNHD" else o
    assert 0 < error(o, wanted) < 1e-5
    weights = randn(*o.shape, seed=7)
    for found, dense in zip(*(torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (o, wanted)), strict=True):
        assert error(found, dense) < 1e-5


@pytest.mark.parametrize("text", ["first", "last"])
def test_patches_stand_in_the_order_of_the_grid_and_text_is_global(text: str) -> None:
    q, k, v = tensors()
    placed = order.grid(GRID, FEW, device="cpu")
    patches, words = (slice(TEXT, None), slice(TEXT)) if text == "first" else (slice(-TEXT), slice(-TEXT, None))
    rows = [placed.apply(x[:, :, patches]) for x in (q, k, v)]
    wanted = llsa_gen.compile(FEW)(*rows, k_global=k[:, :, words], v_global=v[:, :, words])
    assert isinstance(wanted, Tensor)
    o = engine(FEW, text=text, min_tokens=0)(q, k, v, grid=GRID, n_text=TEXT)
    assert torch.equal(o[:, :, patches], placed.restore(wanted))
    assert error(o[:, :, words], scaled_dot_product_attention(q[:, :, words], k, v)) < 1e-6


def test_a_compiled_operator_or_its_module_is_a_spec() -> None:
    operator, (q, k, v) = llsa_gen.compile(FEW), tensors()
    for step in (0, 5):  # by the spec, and by a rule that changes it
        wanted = engine(FEW, min_tokens=0, schedule="topk 1 for step 5")(q, k, v, grid=GRID, n_text=TEXT, step=step)
        for spec in (operator, operator.as_module()):
            fn = engine(spec, min_tokens=0, schedule="topk 1 for step 5")
            assert torch.equal(fn(q, k, v, grid=GRID, n_text=TEXT, step=step), wanted)


def test_tokens_without_a_grid_are_a_sequence() -> None:
    q, k, v = tensors(text=0)
    wanted = llsa_gen.compile(FEW)(q, k, v)
    assert isinstance(wanted, Tensor)
    assert torch.equal(engine(FEW, min_tokens=0)(q, k, v, grid=(48,)), wanted)


SCHEDULE = [
    "dense for the first 2 steps",
    "dense for layers 0 and 1",
    "topk 3, 4 for layers 5 to 6",
    "topk 64 for step 9",
]


@pytest.mark.parametrize(
    ("step", "layer", "topk"),
    [(0, 7, None), (1, 5, None), (2, 0, None), (9, 1, None), (2, 5, (3, 4)), (9, 6, (3, 4)), (9, 7, (64, 64)),
     (2, 2, (2, 2)), (8, 7, (2, 2))],
)  # fmt: skip
def test_the_first_rule_that_fits_holds(step: int, layer: int, topk: tuple[int, int] | None) -> None:
    q, k, v = tensors()
    o = engine(FEW, schedule=SCHEDULE, min_tokens=0)(q, k, v, grid=GRID, n_text=TEXT, step=step, layer=layer)
    if topk is None:
        assert torch.equal(o, scaled_dot_product_attention(q, k, v))
    else:
        fields = FEW.model_dump()
        levels = [{**level, "topk": kept} for level, kept in zip(fields["levels"], topk, strict=True)]
        assert torch.equal(o, engine({**fields, "levels": levels}, min_tokens=0)(q, k, v, grid=GRID, n_text=TEXT))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("dense for the first 3 steps", Rule(steps=range(3))),
        ("dense  for the first 1 step", Rule(steps=range(1))),
        ("dense for layer 4", Rule(layers=frozenset({4}))),
        ("dense for layers 0, 1 and 5 to 7", Rule(layers=frozenset({0, 1, 5, 6, 7}))),
        ("topk 16 for steps 4 to 6 and 9", Rule(16, steps=frozenset({4, 5, 6, 9}))),
        ("topk 32, 8 for layer 2", Rule((32, 8), layers=frozenset({2}))),
    ],
)
def test_rules_as_texts(text: str, rule: Rule) -> None:
    assert rules(text) == rules([text]) == rules([rule]) == (rule,)


def test_a_rule_of_both_axes() -> None:
    rule = Rule(8, steps=range(4), layers=(2, 3))
    assert rule.meets(3, 2) and not rule.meets(4, 2) and not rule.meets(0, 1)
    assert str(rule) == "topk 8 for steps 0 to 3 of layers 2 to 3"
    assert str(Rule(steps=(7, 1, 2, 3))) == "dense for steps 1 to 3, 7"


@pytest.mark.parametrize(
    "fields", [{"topk": 2.5}, {"topk": ()}, {"topk": [4, 4]}, {"topk": True}, {"steps": 3}, {"layers": "01"},
               {"steps": [1.0]}, {"layers": [-1]}],
)  # fmt: skip
def test_fields_that_are_no_rule(fields: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"schedule: expected .*{next(iter(fields))}"):
        Rule(**fields)


@pytest.mark.parametrize("schedule", ["dense", "dense for step", "dens for layer 1", "topk for step 1", [3], 3])
def test_texts_that_are_no_rules(schedule: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="schedule: expected rules such as"):
        engine(FEW, schedule=schedule)


CALLS: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"is_causal": True}, {}, ValueError, 'is_causal: expected False, got True; .*otherwise="dense"'),
    ({"k": randn(2, 4, 20, D), "v": randn(2, 4, 20, D)}, {}, ValueError, r"k, v: expected .* self-attention, got \[2"),
    ({"k": randn(2, 3, 51, D), "v": randn(2, 3, 51, D)}, {}, ValueError, "k: expected a divisor of 4 heads, got 3"),
    ({"v": randn(2, 4, 51, 8)}, {}, ValueError, "q, k, v: expected head dim 16, as in the spec, got 16, 16 and 8"),
    ({"q": randn(2, 4, 51, D).double()}, {}, ValueError, "q, k, v: expected float32.*got torch.float64"),
    ({"q": randn(4, 51, D)}, {}, ValueError, r"q: expected a tensor \[B, H, N, D\], got shape \[4, 51, 16\]"),
    ({"q": None}, {"layout": "BNHD"}, TypeError, r"q: expected a tensor \[B, N, H, D\], got NoneType"),
    ({"grid": None}, {}, TypeError, r"grid: expected the shape of the patches, .* got NoneType"),
    ({"grid": (6, 9)}, {}, ValueError, r"grid: expected 48 patches beside 3 of text, got \[6, 9\]"),
    ({"grid": (6, -8)}, {}, ValueError, r"grid: .*, got \[6, -8\]"),
    ({"n_text": -1}, {}, ValueError, "n_text: expected an integer of at least 0, got -1"),
    ({"n_text": 3.0}, {}, TypeError, "n_text: expected an integer of at least 0, got float"),
    ({}, {"schedule": "dense for the first 2 steps"}, ValueError, "step: .* the schedule speaks of steps, got None"),
    ({"step": 3}, {"schedule": SCHEDULE}, ValueError, "layer: .* the schedule speaks of layers, got None"),
    ({"step": True}, {}, TypeError, "step: expected an integer of at least 0, got bool"),
    ({"attn_mask": None}, {}, TypeError, "unexpected keyword argument 'attn_mask'"),
    ({"dropout_p": 0.1}, {}, TypeError, "unexpected keyword argument 'dropout_p'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "made", "kind", "message"), CALLS, ids=[message for *_, message in CALLS])
def test_calls_that_are_refused(change: dict[str, Any], made: dict[str, Any], kind: type, message: str) -> None:
    call = {**dict(zip("qkv", tensors(), strict=True)), "grid": GRID, "n_text": TEXT, **change}
    with pytest.raises(kind, match=message):
        engine(FEW, min_tokens=0, **made)(**call)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"layout": "HND"}, 'layout: expected "BHND" or "BNHD", got \'HND\''),
        ({"text": "middle"}, "text: expected .* got 'middle'"),
        ({"otherwise": "sparse"}, "otherwise: expected .* got 'sparse'"),
        ({"min_tokens": -1}, "min_tokens: expected an integer of at least 0, got -1"),
        (
            {"schedule": "topk 1, 2, 3 for step 0"},
            r"schedule: expected topk for 2 levels, .* got \[1, 2, 3\]",
        ),
        ({"schedule": "topk 1000 for step 0"}, "schedule: expected topk of 1 to 512, .* got 1000"),
        ({"schedule": "topk 0 for step 0"}, "schedule: expected topk of 1 to 512, .* got 0"),
        ({"schedule": "topk 4 for steps 9 to 4"}, "schedule: expected the smaller number .* got '9 to 4'"),
        ({"layout": ["BHND"]}, r"layout: expected .* got \['BHND'\]"),
    ],
)
def test_arguments_that_are_refused(made: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine(FEW, **made)


def test_what_is_refused_is_dense_where_that_is_asked_for() -> None:
    fn = engine(FEW, min_tokens=0, otherwise="dense")
    q, k, v = tensors()
    assert torch.equal(fn(q, k, v, is_causal=True), scaled_dot_product_attention(q, k, v, is_causal=True))
    q, k, v = q.double(), k.double(), v.double()
    assert torch.equal(fn(q, k, v, scale=0.1), scaled_dot_product_attention(q, k, v, scale=0.1))
    assert fn.report().dense == 2


def test_the_report_says_what_went_where(capsys: pytest.CaptureFixture[str]) -> None:
    fn = engine(FEW, schedule=["dense for the first 2 steps", "topk 3 for layer 1"], min_tokens=0)
    for step in range(4):
        for layer in range(2):
            fn(*tensors(), grid=GRID, n_text=TEXT, step=step, layer=layer)
    counts = fn.report()
    assert str(counts) in capsys.readouterr().out
    assert [(row.layer, row.route, row.why, row.calls, row.tokens) for row in counts.rows] == [
        ("layer 0", "dense", "dense for steps 0 to 1", 2, "48 + 3 text"),
        ("layer 0", "sparse", "", 2, "48 + 3 text"),
        ("layer 1", "dense", "dense for steps 0 to 1", 2, "48 + 3 text"),
        ("layer 1", "sparse", "topk 3, 3", 2, "48 + 3 text"),
    ]
    short = engine(FEW, min_tokens=49)
    assert torch.equal(short(*tensors(), grid=GRID, n_text=TEXT), scaled_dot_product_attention(*tensors()))
    assert short.report().rows[0].why == "fewer than 49 tokens"


def test_copies_and_pickles_do_the_same() -> None:
    fn = engine(FEW, schedule=SCHEDULE, min_tokens=0)
    call: dict[str, Any] = {"grid": GRID, "n_text": TEXT, "step": 9, "layer": 7}
    wanted = fn(*tensors(), **call)
    for other in (copy.deepcopy(fn), pickle.loads(pickle.dumps(fn))):
        assert torch.equal(other(*tensors(), **call), wanted)
        assert repr(other) == repr(fn) and other.report().sparse == 1


def test_compiled_without_a_break() -> None:
    torch._dynamo.reset()
    fn = engine(FEW, schedule=SCHEDULE, min_tokens=0)
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    for step, layer in ((0, 7), (2, 7), (3, 5)):  # the second of each makes a symbol of it
        call: dict[str, Any] = {"grid": GRID, "n_text": TEXT, "step": step, "layer": layer}
        assert torch.equal(compiled(*tensors(), **call), fn(*tensors(), **call))
    torch._dynamo.reset()
