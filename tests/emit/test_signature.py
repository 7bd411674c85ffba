"""Parameters of kernels and the host's launches of them: one list, in the order of the plan."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from examples import GLUON
from llsa_gen import Spec, emit, load
from llsa_gen.emit import signature
from llsa_gen.plan import Scalar, lower
from llsa_gen.schedule import schedules

ROOT = Path(__file__).resolve().parents[2]
SPECS = [*map(load, sorted((ROOT / "spec").glob("*.yaml"))), *(spec for spec, _ in GLUON.values())]
STRIDES = {"q": "q", "k": "k", "v": "v", "g": "grad_o"}


def functions(spec: Spec) -> dict[str, ast.FunctionDef]:
    text = emit.render(lower(spec), schedules(lower(spec)))
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def parameters(kernel: ast.FunctionDef) -> list[str]:
    """Of a kernel, its parameters but for tile shapes, which are annotated."""
    return [argument.arg for argument in kernel.args.args if argument.annotation is None]


def launched(function: ast.FunctionDef) -> dict[str, list[str]]:
    """The arguments of the launches in a function of the host, by kernel: as the parameters that they are for."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "launch":
            kernels, *given = map(ast.unparse, node.args)
            names = [name for one in given for name in as_parameters(one)]
            found |= dict.fromkeys(kernels.strip("()").split(", "), names)
    return found


def as_parameters(argument: str) -> list[str]:
    if argument.startswith("*"):
        letter = next(x for x, name in STRIDES.items() if argument == f"*{name}_steps")
        return [f"stride_{letter}{axis}" for axis in "bhn"]
    argument = argument.removeprefix("handed_")
    number = {"pooled_tokens": "m_tokens"}.get(argument.removeprefix("at."), argument.removeprefix("at."))
    return [number] if argument.startswith("at.") or argument == "scale" else [f"{argument}_ptr"]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_launch_hands_over_what_the_kernel_takes_in_its_order(spec: Spec) -> None:
    code, plan = functions(spec), lower(spec)
    hosts = ("forward_launches", "grad_launches")
    launches = {kernel: names for host in hosts for kernel, names in launched(code[host]).items()}
    kernels = {name for name in code if name.endswith("_kernel")}
    assert launches.keys() == kernels
    for kernel, names in launches.items():
        assert parameters(code[kernel]) == names, kernel
    assert {kernel.name for kernel in plan.kernels} <= kernels


def test_a_new_argument_is_written_once() -> None:
    """A buffer and a number more in the plan are parameters with their comments, and arguments of the launch."""
    plan = lower(SPECS[0])
    before = plan.kernel["invert_l1_kernel"]
    kernel = replace(before, reads=(*before.reads, "delta"), scalars=(Scalar("limit", "most"), *before.scalars))
    assert "\n    delta_ptr,  # [B*H, M] float32\n" in signature.parameters(plan, kernel)
    assert "\n    limit, m_tokens, n_tokens, saved_step,  # most, M, N, " in signature.parameters(plan, kernel)
    launched = " ".join(signature.launch(plan, (), kernel).split())
    assert ", delta, keepers_l1, at.limit, at.m_tokens, at.n_tokens," in launched


def test_a_list_is_told_its_width_once() -> None:
    plan = lower(load(ROOT / "spec" / "llsa_l2.yaml"))
    names = signature.parameters(plan, plan.kernel["grad_kv_l1_sum_kernel"])
    assert (
        names.count("width_l2,") == 1 and "kept_l2_ptr, width_l2," in names and "keepers_l2_ptr, offsets" not in names
    )


def test_what_a_buffer_holds_is_said_where_it_is_made() -> None:
    plan = lower(load(ROOT / "spec" / "llsa_l2.yaml"))
    says = plan.buffers["lse"].says
    assert f"lse_ptr,  # [B*H, M] float32, out: {says}" in signature.parameters(plan, plan.kernel["attend_kernel"])
    made, read = (signature.parameters(plan, plan.kernel[f"{name}_kernel"]) for name in ("scan", "invert_l2"))
    assert plan.buffers["offsets_l2"].says in made and plan.buffers["offsets_l2"].says not in read


def moved_in_loops(function: ast.FunctionDef) -> set[str]:
    """The pointers among a function's parameters that a loop assigns to: it would move them again and again."""
    given = {argument.arg for argument in function.args.args if argument.arg.endswith("_ptr")}
    loops = [node for node in ast.walk(function) if isinstance(node, ast.For | ast.While)]
    names = [node for loop in loops for node in ast.walk(loop) if isinstance(node, ast.Name)]
    return given & {node.id for node in names if isinstance(node.ctx, ast.Store)}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_no_loop_moves_a_pointer_that_its_function_is_given(spec: Spec) -> None:
    assert not {name: moved for name, one in functions(spec).items() if (moved := moved_in_loops(one))}
