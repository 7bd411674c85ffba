"""The compiler and its operators: cached, keyed by everything, side by side with others, clear when misused."""

import copy
import importlib
import importlib.util
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_imports import imports
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from llsa_gen import Level, Spec, compile, compiler, emit, load, reference
from llsa_gen.compiler import Attention, cache_key, explain_miss
from llsa_gen.emit import module as emission
from llsa_gen.errors import MissingSpecFile, SpecError
from llsa_gen.plan import lower
from llsa_gen.schedule import schedules
from llsa_gen.store import Store

ROOT = Path(__file__).resolve().parents[1]
SPEC = Spec(name="compiled", head_dim=24, levels=(Level(block=4, topk=3), Level(block=3, topk=2)))
OTHER = SPEC.model_copy(update={"levels": (Level(block=4, topk=1), Level(block=3, topk=2))})


@pytest.fixture(scope="module")
def attention() -> Attention:
    return compile(SPEC)


def qkv(n: int = 50, *, grad: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(2, 3, n, 24, generator=made).to(dtype).requires_grad_(grad) for _ in range(3))
    return q, k, v


def output(attention: Callable[..., Any], *tensors: Tensor, **options: object) -> Tensor:
    o = attention(*tensors, **options)
    assert isinstance(o, Tensor)
    return o


def error_of(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> float:
    true = reference.attention(attention.spec, q, k, v, indices=attention.select(q, k))
    assert isinstance(true, Tensor)
    return float((output(attention, q, k, v).double() - true).norm() / true.norm())


# ---- cached -----------------------------------------------------------------------------------------------------


def test_the_same_spec_is_the_same_object_however_it_is_said(attention: Attention, tmp_path: Path) -> None:
    path = tmp_path / "compiled.yaml"
    path.write_text(SPEC.to_yaml())
    as_dict = json.loads(SPEC.canonical())
    assert all(compile(said) is attention for said in (SPEC, path, str(path), as_dict, load(path)))
    assert compile(OTHER) is not attention


def test_what_runs_is_what_is_stored(attention: Attention) -> None:
    assert attention.path is not None and attention.path.name == "compiled.py"
    assert attention.path.read_text() == attention.source
    assert attention.spec == SPEC
    assert load(attention.module.SPEC) == SPEC
    assert repr(attention) == f"Attention('compiled', {attention.path})"
    assert explain_miss(SPEC).outcome == "hit"


def test_copies_are_the_operator_itself(attention: Attention) -> None:
    assert copy.deepcopy(attention) is attention
    assert pickle.loads(pickle.dumps(attention)) is attention


def test_wrong_specs_are_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(MissingSpecFile, match="expected a spec file, got no such file"):
        compile(tmp_path / "gone.yaml")
    with pytest.raises(SpecError, match="levels"):
        compile({"name": "x", "head_dim": 8})


# ---- the key ----------------------------------------------------------------------------------------------------


def digest(spec: Spec = SPEC) -> str:
    plan = lower(spec)
    return cache_key(plan, schedules(plan)).digest


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another"},
        {"description": "in other words"},
        {"head_dim": 25},
        {"levels": (Level(block=5, topk=3), Level(block=3, topk=2))},
        {"levels": (Level(block=4, topk=3), Level(block=3, topk=1))},
        {"levels": (Level(block=4, topk=3),)},
        {"enrich": "none"},
        {"enrich": (1,)},
        {"reweight": False},
    ],
    ids=str,
)
def test_every_field_of_the_spec_changes_the_key(change: dict[str, object]) -> None:
    assert digest(SPEC.model_copy(update=change)) != digest()


def test_the_schedule_changes_the_key() -> None:
    plan = lower(SPEC)
    tables = copy.deepcopy(schedules(plan))
    before = cache_key(plan, tables).digest
    tables["cuda:90"][2]["attend"]["num_warps"] += 1
    assert cache_key(plan, tables).digest != before


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_the_versions_change_the_key(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, version = digest(), compiler.version
    monkeypatch.setattr(compiler, "_installed", lambda name: "9.9" if name == package else version(name))
    assert digest() != before


def test_the_version_of_the_generator_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest()
    monkeypatch.setattr(emit, "generator_version", lambda: "9.9")
    assert digest() != before


@pytest.mark.parametrize("template", emission.template_names())
def test_every_template_changes_the_key(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest()
    templates = shutil.copytree(emit.TEMPLATES, tmp_path / "templates")
    (templates / template).write_bytes((templates / template).read_bytes() + b"\n")
    monkeypatch.setattr(emission, "TEMPLATES", templates)
    assert digest() != before


@pytest.mark.parametrize("generator", compiler.GENERATORS)
def test_every_generator_changes_the_key(generator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, package = digest(), Path(compiler.__file__).parent
    for name in compiler.GENERATORS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((package / name).read_bytes() + (b"\n" if name == generator else b""))
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "compiler.py"))
    assert digest() != before


def test_all_modules_that_decide_what_is_emitted_are_in_the_key() -> None:
    """Those that emit/module.py imports, and so on; spec and runtime have parts of the key that are their own."""
    package, found, waiting = Path(compiler.__file__).parent, set[str](), ["emit.module"]
    while waiting:
        name = waiting.pop()
        path = package / f"{name.replace('.', '/')}.py"
        path = path if path.exists() else package / name / "__init__.py"
        if name not in found and name.partition(".")[0] not in ("spec", "runtime", "errors"):
            found.add(name)
            waiting += imports(path.read_text())[0]
    files = {f"{name.replace('.', '/')}.py" for name in found if "." in name}  # the others only offer names of these
    assert files == set(compiler.GENERATORS)


def test_the_key_is_known_without_rendering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    plan = lower(SPEC)
    store.fetch(cache_key(plan, schedules(plan)), lambda: emit.render(plan, schedules(plan)))
    monkeypatch.setattr(emit, "render", lambda *_: pytest.fail("rendered, though stored"))
    monkeypatch.setattr(compiler, "_compiled", {})
    assert compile(SPEC, store=store).path == store.get(cache_key(plan, schedules(plan)))


# ---- side by side -----------------------------------------------------------------------------------------------


def import_file(path: Path, name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def exported(attention: Attention, tmp_path: Path) -> Path:
    path = tmp_path / "exported.py"
    path.write_text(attention.source)
    return path


def test_two_versions_of_a_spec_live_in_one_process(attention: Attention) -> None:
    other = compile(OTHER)
    assert other.spec.name == attention.spec.name
    assert other.module.OPERATOR != attention.module.OPERATOR
    q, k, v = qkv()
    for one in (attention, other, attention):
        assert error_of(one, q, k, v) < 1e-5
    assert other.select(q, k)[0].shape[-1] == 1


def test_an_exported_copy_lives_beside_the_compiled_one(attention: Attention, exported: Path) -> None:
    copies = [import_file(exported, "first_copy"), import_file(exported, "second_copy")]
    assert {module.OPERATOR for module in copies} == {attention.module.OPERATOR}
    q, k, v = qkv(grad=True)
    expected = output(attention, q, k, v)
    (wanted,) = torch.autograd.grad(expected.sum(), k, retain_graph=True)
    for module in copies:
        o = output(module.attention, q, k, v)
        assert torch.equal(o, expected)
        assert torch.equal(torch.autograd.grad(o.sum(), k)[0], wanted)
        assert all(map(torch.equal, module.select(q, k), attention.select(q, k)))


ALONE = """
import gc, importlib, sys
sys.modules["llsa_gen"] = None  # any import of it fails
import torch
torch.manual_seed(0)
q = torch.randn(1, 2, 50, 24, requires_grad=True)

import exported
first = exported.attention(q, q, q)
{then}
second = exported.attention(q, q, q)
second.sum().backward()
assert torch.equal(first, second) and q.grad is not None
print("fine")
"""


@pytest.mark.parametrize(
    "then",
    [
        "",
        "exported = importlib.reload(exported)",
        "importlib.reload(exported); exported = importlib.reload(exported)",
        "del sys.modules['exported'], exported; gc.collect(); import exported",
        "twin = exported; del sys.modules['exported']; import exported; assert twin is not exported; del twin",
    ],
    ids=["once", "reloaded", "reloaded twice", "forgotten and imported again", "twice, the first one gone"],
)
def test_an_exported_module_stands_alone_and_may_be_imported_again(exported: Path, then: str) -> None:
    program = ALONE.format(then=then)
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=exported.parent, capture_output=True, text=True, timeout=600
    )
    assert result.stdout == "fine\n", result.stderr


LOADED = """
import sys, torch
if "import" in sys.argv:
    import exported
q = torch.randn(1, 2, 33, 24)
o = torch.export.load("model.pt2").module()(q)
assert torch.equal(o, exported.attention(q, q, q))
print("fine")
"""


def test_a_saved_program_runs_in_a_fresh_process(attention: Attention, exported: Path) -> None:
    """By the documented import; without it torch's own error names the operator, and so the module to import."""

    class Model(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return output(attention, q, q, q)

    n = torch.export.Dim("n", min=2)
    program = torch.export.export(Model(), (torch.randn(1, 2, 50, 24),), dynamic_shapes=({2: n},))
    torch.export.save(program, exported.parent / "model.pt2")
    with_it, without = (
        subprocess.run(
            [sys.executable, "-c", LOADED, *words], cwd=exported.parent, capture_output=True, text=True, timeout=600
        )
        for words in (["import"], [])
    )
    assert with_it.stdout == "fine\n", with_it.stderr
    assert without.returncode != 0 and attention.module.OPERATOR in without.stderr


# ---- misused ----------------------------------------------------------------------------------------------------

Q, K, V = qkv(12)

WRONG: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "None": ({"q": None}, TypeError, r"q: expected a tensor \[B, H, N, 24\], got NoneType"),
    "a list": ({"k": [K]}, TypeError, r"k: expected a tensor .* got list"),
    "an array": ({"v": V.numpy()}, TypeError, "v: expected a tensor .* got ndarray"),
    "a number": ({"q": 1.0}, TypeError, "q: expected a tensor .* got float"),
    "no heads": ({"q": Q[0]}, ValueError, r"q: expected 4 dimensions \[B, H, N, 24\], got shape \[3, 12, 24\]"),
    "too many dimensions": ({"k": K[None]}, ValueError, "k: expected 4 dimensions .* got shape"),
    "head dim": ({"v": V[..., :23]}, ValueError, r"v: expected head dim 24, got 23 in shape \[2, 3, 12, 23\]"),
    "head dim of all": (dict.fromkeys("qkv", Q[..., :8]), ValueError, "q: expected head dim 24, got 8"),
    "head dim last": ({"q": Q.mT}, ValueError, r"q: expected head dim 24, got 12 in shape \[2, 3, 24, 12\]"),
    "float64": ({"q": Q.double()}, TypeError, "q: expected .*bfloat16, got torch.float64"),
    "integers": ({"k": K.int()}, TypeError, "k: expected .*bfloat16, got torch.int32"),
    "complex": ({"v": V + 0j}, TypeError, "v: expected .*bfloat16, got torch.complex64"),
    "booleans": ({"v": V > 0}, TypeError, "v: expected .*bfloat16, got torch.bool"),
    "float8": ({"k": K.to(torch.float8_e4m3fn)}, TypeError, "k: expected .*bfloat16, got torch.float8"),
    "two dtypes": ({"k": K.half()}, TypeError, "k: expected torch.float32 like q, got torch.float16"),
    "two dtypes more": ({"q": Q.bfloat16(), "k": K.bfloat16()}, TypeError, "v: expected torch.bfloat16 like q"),
    "batches": ({"k": K[:1]}, ValueError, r"k: expected \[2, 3, N, 24\] like q, got \[1, 3, 12, 24\]"),
    "heads": ({"v": V[:, :1]}, ValueError, r"v: expected \[2, 3, N, 24\] like q, got \[2, 1, 12, 24\]"),
    "lengths": ({"k": K[:, :, :5]}, ValueError, r"v: expected shape \[2, 3, 5, 24\] like k, got \[2, 3, 12, 24\]"),
    "values longer": ({"v": torch.cat([V, V], 2)}, ValueError, "v: expected shape .* like k"),
    "sparse": ({"q": Q.to_sparse()}, TypeError, "q: expected a dense tensor, got layout torch.sparse_coo"),
    "nested": ({"q": torch.nested.nested_tensor([Q[0], Q[1]])}, TypeError, "q: expected a dense tensor"),
    "jagged": (
        {"q": torch.nested.nested_tensor([Q[0], Q[1]], layout=torch.jagged)},
        TypeError,
        "q: expected a dense tensor, got layout torch.jagged",
    ),
    "meta": ({"k": K.to("meta")}, ValueError, "k: expected device cpu like q, got meta"),
    "too many tokens": (
        dict.fromkeys("qkv", Q[:1, :1, :1].expand(1, 1, 2**31, 24)),
        ValueError,
        "q: expected at most .* tokens, got M = 2147483648",
    ),
    "scale, bool": ({"scale": True}, TypeError, "scale: expected a number or None, got bool"),
    "scale, text": ({"scale": "0.1"}, TypeError, "scale: expected a number or None, got str"),
    "scale, tensor": ({"scale": torch.tensor(0.1)}, TypeError, "scale: expected a number or None, got Tensor"),
    "scale, complex": ({"scale": 1j}, TypeError, "scale: expected a number or None, got complex"),
    "scale, nan": ({"scale": math.nan}, ValueError, "scale: expected a number from -2.3e\\+38 to 2.3e\\+38, got nan"),
    "scale, infinite": ({"scale": -math.inf}, ValueError, "scale: expected a number from .*, got -inf"),
    "scale, huge": ({"scale": 10**5000}, ValueError, "scale: expected a number from .*, got a larger one"),
    "scale, large": ({"scale": -1e39}, ValueError, "scale: expected a number from .*, got -1e\\+39"),
    "unknown option": ({"causal": True}, TypeError, "causal"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_one_clear_error(wrong: str, attention: Attention) -> None:
    arguments, error, message = WRONG[wrong]
    given_ones: Any = {"q": Q, "k": K, "v": V} | arguments
    with pytest.raises(error, match=message) as caught:
        attention(**given_ones)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


@pytest.mark.parametrize(("q", "k", "message"), [(Q, K[:, :1], "k: expected "), (None, K, "q: expected a tensor")])
def test_select_checks_too(q: Any, k: Tensor, message: str, attention: Attention) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        attention.select(q, k)


def test_a_missing_argument_is_pythons_own_error(attention: Attention) -> None:
    with pytest.raises(TypeError, match="'v'"):
        attention(Q, K)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional arguments"):
        attention(Q, K, V, 0.1)  # type: ignore[misc]


@pytest.mark.parametrize("scale", [None, 0, 1, -0.3, 1e-30, 3])
def test_any_finite_scale_is_taken(scale: float | None, attention: Attention) -> None:
    true = reference.attention(SPEC, Q, K, V, scale=scale, indices=attention.select(Q, K))
    torch.testing.assert_close(output(attention, Q, K, V, scale=scale).double(), true, rtol=1e-4, atol=1e-5)


# ---- edges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3, 12, 24), (2, 0, 12, 24), (0, 0, 1, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_heads_at_all(shape: tuple[int, ...], dtype: torch.dtype, attention: Attention) -> None:
    q, k, v = (torch.empty(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    o, lse = attention(q, k, v, return_lse=True)
    assert (o.shape, o.dtype, lse.shape, lse.dtype) == (q.shape, dtype, q.shape[:3], torch.float32)
    o.sum().backward()
    assert all(x.grad is not None and x.grad.shape == q.shape for x in (q, k, v))
    wanted = attention.select(*(torch.randn(1, 1, *shape[2:]) for _ in range(2)))
    kept = attention.select(q, k)
    assert [x.shape for x in kept] == [(*shape[:2], *x.shape[2:]) for x in wanted]
    assert {x.dtype for x in kept} == {torch.int32}


def test_without_gradients_nothing_is_kept(attention: Attention) -> None:
    q, k, v = qkv(grad=True)
    with torch.no_grad():
        assert not output(attention, q, k, v).requires_grad
    with torch.inference_mode():
        assert output(attention, q, k, v).is_inference()
    assert all(not kept.requires_grad for kept in attention.select(q, k))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_some_inputs_want_a_gradient(wanted: tuple[int, ...], attention: Attention) -> None:
    tensors = qkv(grad=True)
    everything = torch.autograd.grad(output(attention, *tensors).sum(), tensors)
    some = [x if index in wanted else x.detach() for index, x in enumerate(tensors)]
    leaves = [some[index] for index in wanted]
    found = torch.autograd.grad(output(attention, *some).sum(), leaves)
    assert all(torch.equal(grad, everything[index]) for index, grad in zip(wanted, found, strict=True))


@pytest.fixture
def quietly() -> Iterator[None]:
    """Warnings of torch are no answer: a wrong number would come after them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_gradient_penalty_is_refused_and_not_silently_wrong(attention: Attention, quietly: None) -> None:
    q, k, v = qkv(grad=True)
    o = output(attention, q, k, v)
    (grad,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"gradients of gradients are not available$"):
        (o.sum() + grad.square().sum()).backward()


def test_forward_mode_is_refused_and_not_silently_zero(attention: Attention, quietly: None) -> None:
    # torch gives the operator itself no sign of it: the tangent of what it returns would be zero
    import torch.autograd.forward_ad as forward_ad

    message = "^k: forward-mode derivatives are not available, got a dual tensor$"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        attention(Q, forward_ad.make_dual(K, torch.ones_like(K)), V)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda k: attention(Q, k, V), (K,), (K,))


@pytest.mark.parametrize("n", [2, 16, 41])
@pytest.mark.parametrize(
    "dtypes", ["float32 float32 float32", "bfloat16 bfloat16 bfloat16", "float32 float16 bfloat16"]
)
def test_autocast_decides_the_dtype(n: int, dtypes: str, attention: Attention) -> None:
    # as in torch's own attention: whatever comes is rounded to bfloat16 first, and then nothing more is
    *drawn, grad_o = torch.randn(4, 1, 2, n, SPEC.head_dim).unbind()
    leaves = [x.to(getattr(torch, name)).requires_grad_() for x, name in zip(drawn, dtypes.split(), strict=True)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in leaves]
    o = output(attention, *rounded)
    expected = [o, *attention.select(*rounded[:2]), *torch.autograd.grad(o, rounded, grad_o.bfloat16())]
    with torch.autocast("cpu", torch.bfloat16):
        o = output(attention, *leaves)
        found = [o, *attention.select(*leaves[:2]), *torch.autograd.grad(o, leaves, grad_o.bfloat16())]
        q, k, v = leaves
        assert o.dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype
    assert all(torch.equal(x, y.to(x.dtype)) for x, y in zip(found, expected, strict=True))


# ---- torch's own checks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_pass_torchs_checks(attention: Attention, dtype: torch.dtype) -> None:
    name = attention.module.OPERATOR
    q, k, v = qkv(30, grad=True, dtype=dtype)
    operators = torch.ops.llsa
    torch.library.opcheck(getattr(operators, name).default, (q, k, v, 0.2))
    with torch.no_grad():
        o, lse, saved = getattr(operators, name)(q, k, v, 0.2)
        torch.library.opcheck(getattr(operators, f"{name}_select").default, (q.detach(), k.detach()))
        for grad_lse in (None, torch.randn_like(lse)):
            backward = (torch.randn_like(o), grad_lse, q.detach(), k.detach(), v.detach(), o, saved, 0.2)
            torch.library.opcheck(getattr(operators, f"{name}_backward").default, backward)


def test_what_is_saved_may_be_kept_in_a_piece_with_other_tensors(attention: Attention) -> None:
    def pack(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (1, 1)) if x.dtype == torch.uint8 else x

    def unpack(x: torch.Tensor) -> torch.Tensor:
        return x[..., 1:-1] if x.dtype == torch.uint8 else x

    leaves = qkv(300, grad=True)
    wanted = torch.autograd.grad(output(attention, *leaves).sum(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        o = output(attention, *leaves)
    assert all(map(torch.equal, torch.autograd.grad(o.sum(), leaves), wanted))


class Watching(TorchDispatchMode):
    """Sees every operator, as profilers, FLOP counters and activation checkpointing do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_it_runs_while_torch_is_watched(attention: Attention) -> None:
    q, k, v = qkv(30, grad=True)
    (wanted,) = torch.autograd.grad(output(attention, q, k, v).sum(), k)
    with Watching():
        (found,) = torch.autograd.grad(output(attention, q, k, v).sum(), k)
    assert torch.equal(found, wanted)


def test_activation_checkpointing_gives_the_same_gradient(attention: Attention) -> None:
    q, k, v = qkv(30, grad=True)
    wanted = torch.autograd.grad(output(attention, q, k, v).square().sum(), (q, k, v))
    o = checkpoint(attention, q, k, v, use_reentrant=False)
    assert isinstance(o, Tensor)
    assert all(map(torch.equal, torch.autograd.grad(o.square().sum(), (q, k, v)), wanted))


def test_it_compiles_cold_in_one_graph(attention: Attention) -> None:
    torch.compiler.reset()

    def block(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(-1, (3, 3, 24)).permute(2, 0, 3, 1, 4).unbind(0)
        o, lse = attention(q, k, v, return_lse=True)
        return o.transpose(1, 2).flatten(2) * lse.mean()

    x, weight = torch.randn(2, 40, 16, requires_grad=True), torch.randn(16, 3 * 3 * 24) / 4
    expected = block(x, weight)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), expected)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, weight).sum(), x)[0], wanted)
    longer = torch.randn(2, 57, 16, requires_grad=True)
    torch.testing.assert_close(compiled(longer, weight), block(longer, weight))


# ---- once -------------------------------------------------------------------------------------------------------

FIRST_RESULT = """
import torch, llsa_gen
from llsa_gen import emit
rendered, render = [], emit.render
emit.render = lambda plan, *rest: rendered.append(plan.spec.name) or render(plan, *rest)
attention = llsa_gen.compile({spec!r})
q, k, v = torch.randn(3, 1, 2, 100, 64).requires_grad_().unbind(0)
attention(q, k, v).sum().backward()
print(rendered)
"""


def test_a_module_is_rendered_once_for_all_processes(tmp_path: Path) -> None:
    """What makes a warm start a fast one; benchmarks/first_result.py takes the time."""
    environment = os.environ | {"LLSA_GEN_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FIRST_RESULT.format(spec=str(ROOT / "spec" / "llsa_l3.yaml"))]
    for wanted in ("['llsa_l3']\n", "[]\n"):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert result.stdout == wanted, result.stderr
    assert len(list(tmp_path.glob("*/llsa_l3.py"))) == 1


# ---- who sees the calls -----------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes the names of this library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "llsa":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_the_operators_are_there_for_who_watches_and_left_out_where_nobody_does(attention: Attention) -> None:
    operator = attention.module.OPERATOR
    q, k, v = qkv(grad=True)
    with Watch() as watch:
        o = output(attention, q, k, v)
        attention.select(q, k)
        o.sum().backward()
    assert watch.seen == [operator, operator + "_select", operator + "_backward"]
    watched = [x.grad for x in (q, k, v)]
    q.grad = k.grad = v.grad = None
    plain = output(attention, q, k, v)
    assert type(plain.grad_fn).__name__ == "AttendBackward" and torch.equal(plain, o)
    plain.sum().backward()
    assert all(map(torch.equal, watched, (q.grad, k.grad, v.grad)))  # type: ignore[arg-type]
    o = output(attention, q, k, v)
    with Watch() as late:
        o.sum().backward()
    assert late.seen == [operator + "_backward"], "also where only the backward pass is watched"


def test_a_changed_output_is_an_error_and_not_a_wrong_gradient(attention: Attention) -> None:
    """o is kept for the backward pass, as by torch's own attention."""
    o = output(attention, *qkv(grad=True))
    o.mul_(2)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        o.sum().backward()
