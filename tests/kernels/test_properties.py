"""The CPU path: agrees with the float64 reference on drawn inputs, and has the symmetries that its formula has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import llsa_gen
from examples import BRANCHES, spec
from llsa_gen import Spec, fuzz, reference
from llsa_gen.fuzz import oracle as fuzz_oracle

SPECS = {path.stem: path for path in sorted((Path(__file__).parents[2] / "spec").glob("*.yaml"))}
DTYPES: tuple[fuzz.DType, ...] = ("float32", "float16", "bfloat16")


def attend(chosen: Spec, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    o = llsa_gen.compile(chosen)(q, k, v, **options)
    assert isinstance(o, Tensor)
    return o


@st.composite
def inputs(draw: st.DrawFn, count: int = 3) -> tuple[Spec, tuple[Tensor, ...]]:
    """One of the `BRANCHES` and `count` float32 tensors of standard normal numbers for it."""
    chosen = draw(st.sampled_from(BRANCHES))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 200)), chosen.head_dim)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return chosen, tuple(torch.randn(shape, generator=generator) for _ in range(count))


def assert_close(x: Tensor, y: Tensor, tolerance: float = 5e-6) -> None:
    assert reference.relative_error(x, y) < tolerance


# ---- against the reference ------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(case=fuzz.cases())
def test_drawn_specs_agree_with_the_reference(case: fuzz.Case) -> None:
    fuzz.run(case).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_shipped_specs_agree_with_the_reference(name: str, dtype: fuzz.DType) -> None:
    chosen = llsa_gen.load(SPECS[name])
    for n in (1, chosen.block(1) + 1, 777):
        fuzz.run(fuzz.Case(chosen, n=n, heads=2, dtype=dtype)).raise_if_failed()


@pytest.mark.parametrize("chosen", BRANCHES, ids=lambda chosen: chosen.name)
def test_every_branch_agrees_with_the_reference(chosen: Spec) -> None:
    for n in (2, 35, 301):
        fuzz.run(fuzz.Case(chosen, n=n, heads=2)).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [0.1, 1.0, 8.0])
def test_errors_are_at_most_twice_those_of_torch(std: float, dtype: fuzz.DType) -> None:
    # The rule itself, without what `fuzz` allows for chance in small inputs.
    case = fuzz.Case(llsa_gen.load(SPECS["llsa_l2"]), n=700, heads=2, dtype=dtype, std=std)
    tensors = case.tensors()
    found = fuzz.attend(llsa_gen.compile(case.spec), case, *tensors)
    kept = [found["kept_l1"], found["kept_l2"]]
    true = fuzz_oracle.truth(case.spec, *tensors, kept, case.softmax_scale)
    torchs = fuzz_oracle.yardstick(case, *tensors, kept)
    for name in ("o", "dq", "dk", "dv"):
        error = reference.relative_error(found[name], true.values[name])
        assert error <= 2 * reference.relative_error(torchs[name], true.values[name]), name
        if std == 1.0:
            assert error <= reference.tolerance(case.torch_dtype), name


# ---- symmetries -----------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(made=inputs())
def test_keeping_everything_is_dense_attention(made: tuple[Spec, tuple[Tensor, ...]]) -> None:
    chosen, (q, k, v) = made
    everything = [(level.block, 512) for level in chosen.levels]
    dense = spec("everything", chosen.head_dim, *everything, enrich="none")
    assert_close(attend(dense, q, k, v), scaled_dot_product_attention(q, k, v))


@settings(max_examples=15)
@given(made=inputs())
def test_heads_do_not_see_each_other(made: tuple[Spec, tuple[Tensor, ...]]) -> None:
    chosen, (q, k, v) = made
    whole = attend(chosen, q, k, v)
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            one = (slice(batch, batch + 1), slice(head, head + 1))
            assert_close(attend(chosen, q[one], k[one], v[one]), whole[one])


@settings(max_examples=15)
@given(made=inputs(4))
def test_outputs_are_means_of_the_values(made: tuple[Spec, tuple[Tensor, ...]]) -> None:
    chosen, (q, k, v, other) = made
    o = attend(chosen, q, k, v)
    assert_close(attend(chosen, q, k, torch.full_like(v, 3.0)), torch.full_like(v, 3.0))
    assert_close(attend(chosen, q, k, v - 2 * other), o - 2 * attend(chosen, q, k, other), 2e-5)
    assert (o.amax(2) <= v.amax(2) + 1e-5).all() and (o.amin(2) >= v.amin(2) - 1e-5).all()


@settings(max_examples=15)
@given(made=inputs())
def test_the_scale_is_a_factor_of_the_queries(made: tuple[Spec, tuple[Tensor, ...]]) -> None:
    chosen, (q, k, v) = made
    default = chosen.head_dim**-0.5
    expected = attend(chosen, q, k, v)
    assert torch.equal(attend(chosen, q, k, v, scale=default), expected)
    assert_close(attend(chosen, 4 * q, k, v, scale=default / 4), expected)  # a power of two rounds nothing


@settings(max_examples=15)
@given(made=inputs(2))
def test_lse_weighs_the_parts_of_a_softmax(made: tuple[Spec, tuple[Tensor, ...]]) -> None:
    # d lse / d scale = the mean logit: here by finite differences in float64 of what the operator returns in float32
    chosen, (q, k) = made
    op = llsa_gen.compile(chosen)
    o, lse = op(q, k, k, scale=0.3, return_lse=True)
    _, above = op(q, k, k, scale=0.3 + 1e-2, return_lse=True)
    _, below = op(q, k, k, scale=0.3 - 1e-2, return_lse=True)
    slope = (above.double() - below.double()) / 2e-2
    torch.testing.assert_close(slope, (o * q).double().sum(-1), rtol=5e-3, atol=5e-3)
    assert lse.dtype == torch.float32 and not lse.requires_grad
