"""Tokens that everybody sees, and text beside an image."""

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import as_lists, attend, float64_leaves, make_spec, naive_attention, normal
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llsa_gen import reference
from llsa_gen.spec import Spec

KEEP_EVERYTHING = make_spec((3, 512), (5, 512), enrich="none")


def inputs(m: int, n: int, g: int, seed: int = 0) -> list[Tensor]:
    """q, k, v, k_global, v_global of two batch entries and two heads; float64 leaves."""
    return float64_leaves(*(normal(seed + i, 2, 2, length, 8) for i, length in enumerate((m, n, n, g, g))))


def gradients(results: tuple[Tensor, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Of the leaves, zero for those that were not used. What comes in is the same for results of the same shapes."""
    incoming = [normal(50 + i, *x.shape).double() for i, x in enumerate(results)]
    found = torch.autograd.grad(results, leaves, incoming, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if x is None else x for x, leaf in zip(found, leaves, strict=True)]


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(0, 40), st.integers(0, 9))
def test_globals_are_keys_like_any_other_where_everything_is_kept(m: int, n: int, g: int) -> None:
    leaves = q, k, v, k_global, v_global = inputs(m, n, g)
    found = reference.attention(KEEP_EVERYTHING, q, k, v, k_global=k_global, v_global=v_global, return_lse=True)
    keys, values = torch.cat([k_global, k], dim=2), torch.cat([v_global, v], dim=2)
    if n + g:
        dense = scaled_dot_product_attention(q, keys, values), (q @ keys.mT / math.sqrt(8)).logsumexp(-1)
        close(found, dense)
        close(gradients(found, leaves), gradients(dense, leaves))
    else:
        assert (found[0] == 0).all() and (found[1] == -math.inf).all()


SPARSE = make_spec((2, 2), (3, 1))


@settings(max_examples=30)
@given(
    st.integers(0, 30), st.lists(st.tuples(st.booleans(), st.booleans()), max_size=5), st.sampled_from([0.0, math.nan])
)
def test_a_masked_global_is_a_missing_one(n: int, masks: list[tuple[bool, bool]], held: float) -> None:
    leaves = q, k, v, k_global, v_global = inputs(13, n, len(masks))
    mask = torch.tensor(masks).bool().view(len(masks), 2).T.contiguous()
    with torch.no_grad():  # what is masked is not even read
        k_global[~mask[:, None].expand(-1, 2, -1)] += held
        v_global[~mask[:, None].expand(-1, 2, -1)] += held
    found = reference.attention(
        SPARSE, q, k, v, k_global=k_global, v_global=v_global, global_mask=mask, return_lse=True
    )
    found_gradients = gradients(found, leaves)
    # One batch entry after the other, with those that take part; a selection of each entry by itself is the same.
    parts = []
    for b in range(2):
        one = [x[b : b + 1] for x in (q, k, v)]
        shared = {"k_global": k_global[b : b + 1, :, mask[b]], "v_global": v_global[b : b + 1, :, mask[b]]}
        if not mask[b].any():
            shared = {}  # none at all
        parts.append(reference.attention(SPARSE, *one, return_lse=True, **shared))
    expected = cast(tuple[Tensor, Tensor], tuple(torch.cat(part) for part in zip(*parts, strict=True)))
    close(found, expected)
    close(found_gradients, gradients(expected, leaves))
    for gradient in found_gradients[3:]:
        assert (gradient[~mask[:, None].expand(-1, 2, -1)] == 0).all()


def test_globals_alone_with_a_mask_of_nothing() -> None:
    # No keys, and in the first batch entry no global that takes part: nothing to attend to.
    leaves = q, k, v, k_global, v_global = inputs(4, 0, 3)
    mask = torch.tensor([[False] * 3, [False, True, False]])
    o, lse = reference.attention(
        SPARSE, q, k, v, k_global=k_global, v_global=v_global, global_mask=mask, return_lse=True
    )
    assert (o[0] == 0).all() and (lse[0] == -math.inf).all()
    close(o[1], v_global[1, :, 1:2].expand(-1, 4, -1))
    close(lse[1], (q[1] * k_global[1, :, 1:2]).sum(-1) / math.sqrt(8))
    for gradient in gradients((o, lse), leaves):
        assert gradient.isfinite().all() and (gradient[0] == 0).all()


def test_weights_of_globals_stand_last_and_are_one() -> None:
    q, k, _, _, _ = inputs(6, 9, 0)
    kept = reference.select(SPARSE, q, k)
    rows, mask = torch.tensor([1, 5]), torch.tensor([[True, False], [True, True]])
    plain = reference.weight_rows(SPARSE, kept, rows, 9)
    weights = reference.weight_rows(SPARSE, kept, rows, 9, global_mask=mask)
    assert torch.equal(weights[..., :-2], plain)
    assert torch.equal(weights[..., -2:], mask[:, None, None].expand(2, 2, 2, 2).double())


# Joint attention. Against a dense masked softmax where everything is kept, and against loops in general.


@st.composite
def texts(draw: st.DrawFn) -> tuple[int, int, int, Tensor]:
    """How many text tokens first, image tokens, text tokens last; a mask of the text, bool [2, T]."""
    first, image, last = draw(st.integers(0, 4)), draw(st.integers(0, 20)), draw(st.integers(0, 4))
    present = draw(st.lists(st.booleans(), min_size=2 * (first + last), max_size=2 * (first + last)))
    return first, image, last, torch.tensor(present).bool().view(2, first + last)


def takes_part(first: int, image: int, last: int, mask: Tensor) -> Tensor:
    """Bool [2, T + N], in the order of the input."""
    return torch.tensor(
        [[*of_one[:first], *[True] * image, *of_one[first:]] for of_one in mask.tolist()], dtype=torch.bool
    ).view(2, first + image + last)


@settings(max_examples=30)
@given(texts())
def test_joint_attention_is_dense_where_everything_is_kept(text: tuple[int, int, int, Tensor]) -> None:
    first, image, last, mask = text
    leaves = q, k, v = inputs(first + image + last, first + image + last, 0)[:3]
    o, lse = reference.joint_attention(
        KEEP_EVERYTHING, q, k, v, globals_first=first, globals_last=last, global_mask=mask, return_lse=True
    )
    assert o.shape == q.shape and lse.shape == q.shape[:3]
    present = takes_part(*text)
    assert (o[~present[:, None].expand(-1, 2, -1)] == 0).all()
    assert (lse[~present[:, None].expand(-1, 2, -1)] == -math.inf).all()
    # The rows that take part, by a softmax with -1e300 in place of the columns that do not.
    logits = (q @ k.mT / math.sqrt(8)).masked_fill(~present[:, None, None], -1e300)
    rows = present[:, None].expand(-1, 2, -1)
    dense = (logits.softmax(-1) @ v)[rows], logits.logsumexp(-1)[rows]
    found = o[rows], lse[rows]
    close(found, dense)
    close(gradients(found, leaves), gradients(dense, leaves))
    # And through all rows: those of masked tokens add nothing, whatever comes in.
    incoming = normal(60, *o.shape).double(), normal(61, *lse.shape).double()
    everything = torch.autograd.grad([o, lse], leaves, incoming, retain_graph=True)
    close(everything, torch.autograd.grad(found, leaves, [x[rows] for x in incoming]))


@settings(max_examples=20)
@given(texts(), st.sampled_from(["all", "none", (1,)]), st.sampled_from([None, 0.3]))
def test_joint_attention_equals_the_loops(text: tuple[int, int, int, Tensor], enrich: Any, scale: float | None) -> None:
    first, image, last, mask = text
    spec: Spec = make_spec((2, 2), (2, 1), enrich=enrich)
    leaves = inputs(first + image + last, first + image + last, 0)[:3]
    used = 1 / math.sqrt(8) if scale is None else scale
    q_image, k_image, _ = (x[:, :, first : first + image] for x in leaves)
    options: dict[str, Any] = {"globals_first": first, "globals_last": last, "global_mask": mask, "scale": scale}
    plain = reference.joint_attention(spec, *leaves, **options)
    of_image = reference.select(spec, q_image, k_image)
    assert torch.equal(plain, reference.joint_attention(spec, *leaves, indices=of_image, **options))
    kept = reference.select(spec, -q_image, k_image)  # others than it would select by itself
    found = reference.joint_attention(spec, *leaves, indices=kept, return_lse=True, **options)
    present = takes_part(*text)
    for b in range(2):
        lists = [ids[b : b + 1] for ids in kept]
        for head in range(2):
            q, k, v = (x[b, head] for x in leaves)
            others = [j for j in range(len(q)) if not first <= j < first + image and present[b, j]]
            q1, k1, v1 = (x[first : first + image] for x in (q, k, v))
            of_image = naive_attention(
                spec,
                q1,
                k1,
                v1,
                as_lists(lists, head),
                used,
                torch.float64,
                everybodys=[(k[j], v[j]) for j in others],
            )
            close(tuple(x[b, head, first : first + image] for x in found), of_image)
            for j in others:
                seen = [(1, k[i], v[i]) for i in range(len(q)) if present[b, i]]
                close(tuple(x[b, head, j] for x in found), attend(q[j], seen, used))


def test_what_a_masked_text_token_holds_is_not_read() -> None:
    mask = torch.tensor([[True, False, True], [True, True, False]])
    tensors = [x.detach() for x in inputs(12, 12, 0)[:3]]
    options: dict[str, Any] = {"globals_first": 2, "globals_last": 1, "global_mask": mask}
    found = []
    for held in (0.0, math.nan):
        leaves = float64_leaves(*tensors)
        with torch.no_grad():
            for x in leaves:
                x[0, :, 1] += held
                x[1, :, 11] += held
        results = reference.joint_attention(SPARSE, *leaves, return_lse=True, **options)
        found.append([*results, *gradients(results, leaves)])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)
    for gradient in found[0][2:]:
        assert (gradient[0, :, 1] == 0).all() and (gradient[1, :, 11] == 0).all()


def test_without_text_it_is_plain_attention() -> None:
    q, k, v = inputs(17, 17, 0)[:3]
    assert torch.equal(reference.joint_attention(SPARSE, q, k, v), reference.attention(SPARSE, q, k, v))
    nobody = torch.zeros(2, 3, dtype=torch.bool)
    q_text, k_text, v_text = (torch.cat([x[:, :, :2], x, x[:, :, :1]], dim=2) for x in (q, k, v))
    o = reference.joint_attention(SPARSE, q_text, k_text, v_text, globals_first=2, globals_last=1, global_mask=nobody)
    close(o[:, :, 2:-1], reference.attention(SPARSE, q, k, v))
    assert (o[:, :, [0, 1, -1]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pooled_image_tokens_are_rounded_and_text_is_not(dtype: torch.dtype) -> None:
    q, k, v = (normal(i, 1, 1, 20, 8, dtype=dtype) for i in range(3))
    spec = make_spec((3, 2))
    options: dict[str, Any] = {"globals_first": 3, "globals_last": 2}
    kept = reference.select(spec, q[:, :, 3:-2], k[:, :, 3:-2])
    narrow = reference.joint_attention(spec, q, k, v, **options)
    wide = q.double(), k.double(), v.double()
    assert torch.equal(reference.joint_attention(spec, *wide, indices=kept, round_to=dtype, **options), narrow)
    other = reference.joint_attention(spec, *wide, indices=kept, **options)
    assert torch.equal(other[:, :, :3], narrow[:, :, :3]) and torch.equal(other[:, :, -2:], narrow[:, :, -2:])
    assert not torch.equal(other, narrow)


# Arguments.


def test_wrong_globals_are_refused() -> None:
    q, k, v, k_global, v_global = (x.detach() for x in inputs(5, 5, 3))
    mask = torch.ones(2, 3, dtype=torch.bool)

    def of(*names: str, **options: Any) -> Callable[[], object]:
        both = {"k_global": k_global, "v_global": v_global, "global_mask": mask}
        return lambda: reference.attention(SPARSE, q, k, v, **{name: both[name] for name in names}, **options)

    def joint(first: Any, last: Any, **options: Any) -> Callable[[], object]:
        return lambda: reference.joint_attention(SPARSE, q, k, v, globals_first=first, globals_last=last, **options)

    def short_keys() -> object:
        return reference.joint_attention(SPARSE, q, k[:, :, 1:], v[:, :, 1:])

    kg, vg, gm = "k_global", "v_global", "global_mask"
    kept = reference.select(SPARSE, q, k)
    wrong: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "k_global, v_global: expected both or neither, got k_global alone", of(kg)),
        (ValueError, "both or neither, got v_global and global_mask alone", of(vg, gm)),
        (ValueError, "both or neither, got global_mask alone", of(gm)),
        (TypeError, r"k_global: expected a tensor \[B, H, G, 8\], got int", of(vg, k_global=3)),
        (ValueError, r"k_global: .* G, 8\], got \[2, 2, 3, 7\]", of(vg, k_global=k_global[..., :7])),
        (ValueError, "v_global: expected the dtype", of(kg, v_global=v_global.float())),
        (ValueError, r"v_global: .*of q", of(kg, v_global=v_global[:1])),
        (ValueError, "v_global: expected the shape of k_global", of(kg, v_global=v_global[:, :, :2])),
        (ValueError, r"global_mask: expected \[2, 3\] on cpu, got \[2, 2\]", of(kg, vg, global_mask=mask[:, :2])),
        (
            TypeError,
            r"global_mask: expected a bool tensor \[B, G\], got torch.int32",
            of(kg, vg, global_mask=mask.int()),
        ),
        (TypeError, r"global_mask: expected a bool tensor \[B, G\], got list", of(kg, vg, global_mask=[True])),
        (ValueError, "globals_first: expected an integer >= 0, got -1", joint(-1, 0)),
        (TypeError, "globals_last: expected an integer >= 0, got float", joint(0, 1.0)),
        (ValueError, r"globals_first \+ globals_last: expected at most 5 tokens, got 6", joint(2, 4)),
        (ValueError, r"global_mask: expected \[2, 2\] on cpu, got \[2, 3\]", joint(2, 0, global_mask=mask)),
        (ValueError, "k: expected the shape of q", short_keys),
        (ValueError, "indices, level 1: expected integers", joint(0, 2, indices=kept)),
        (ValueError, "scale: expected a finite number", joint(0, 5, scale=math.inf)),
    ]
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
