"""The pipeline: spec -> plan -> schedules -> text -> stored module -> attention, as one short function."""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from llsa_gen import emit, forks, runtime, schedule
from llsa_gen.errors import KernelCompileError, SettingError
from llsa_gen.plan import Plan, lower
from llsa_gen.spec import Spec, load
from llsa_gen.store import Explanation, Key, Store, tuned
from llsa_gen.store.loading import load_text

if TYPE_CHECKING:
    from torch import Tensor
    from torch._ops import OpOverload

    from llsa_gen.module import AttentionModule

GENERATORS = (
    "plan/sizes.py", "plan/levels.py", "plan/buffers.py", "plan/plan.py", "plan/cost.py",
    "schedule/table.py", "schedule/columns.py", "schedule/memory.py", "schedule/fit.py", "schedule/rules.py",
    "emit/networks.py", "emit/literals.py", "emit/printers.py", "emit/signature.py", "emit/module.py",
)  # fmt: skip
"""Modules of this package that decide what is emitted."""

_compiled: dict[str, "Attention"] = {}
_lock = forks.Lock()


class Attention:
    """A compiled operator. Call it on q, k, v; `select` shows what it attends to; `source` is the module that runs."""

    def __init__(self, spec: Spec, module: ModuleType, source: str, path: Path | None) -> None:
        self.spec = spec
        self.module = module
        self.source = source
        """The text of the generated module."""
        self.path = path
        """Where the store keeps that text; None where nothing could be written and it lives in memory."""

    def __call__(
        self, q: "Tensor", k: "Tensor", v: "Tensor", *, scale: float | None = None, return_lse: bool = False,
        query_offset: int = 0, k_global: "Tensor | None" = None, v_global: "Tensor | None" = None,
        global_mask: "Tensor | None" = None, kept: "Sequence[Tensor] | None" = None, check_kept: bool = False,
        layout: str | None = None,
    ) -> "Tensor | tuple[Tensor, Tensor]":  # fmt: skip
        """Attend: q [B, H, M, D] over k, v [B, H, N, D] to o [B, H, M, D], differentiable.

        Tensors may have any strides and be float32, float16 or bfloat16, on a GPU or the CPU. `scale` is 1/sqrt(D)
        unless given. With `return_lse` also the natural logarithm of the sum of weights, [B, H, M] float32,
        differentiable too; without keys o = 0 and lse = -inf. With `query_offset` queries are cut into blocks as if the
        first were that token of a sequence: a shard then has the blocks of the whole.

        Every query also attends to the global tokens k_global, v_global [B, H, G, D], in the same softmax; no block,
        mean or selection has to do with them. Where global_mask, bool [B, G], is False, a token is as good as missing.
        With `kept` nothing is selected: attention follows these lists, the finest level first, int32
        [B, H, T_l(M), W_l], W_l at most K_l, -1 for nothing, as `select` gives them. Their entries are trusted, unless
        check_kept is True, which looks at each of them and waits for the GPU. A query that has nothing to attend to has
        o = 0 and lse = -inf. What looks like [B, N, H, D], far more heads than tokens, is warned of once in a process;
        layout="BHND", the only layout, says that it is meant. Raises TypeError or ValueError naming the argument, what
        came and what was expected.
        """
        try:
            return self.module.attention(
                q, k, v, scale=scale, return_lse=return_lse, query_offset=query_offset, k_global=k_global,
                v_global=v_global, global_mask=global_mask, kept=kept, check_kept=check_kept, layout=layout,
            )  # fmt: skip
        except Exception as error:
            raise self._explained(error) from error.__cause__

    def select(self, q: "Tensor", k: "Tensor", *, query_offset: int = 0) -> "tuple[Tensor, ...]":
        """Kept key tokens of each level, finest first: int32 [B, H, T_l(M), width], -1 where fewer."""
        try:
            return self.module.select(q, k, query_offset=query_offset)
        except Exception as error:
            raise self._explained(error) from error.__cause__

    @property
    def operator(self) -> "OpOverload":
        """The operator as torch knows it, `torch.ops.llsa.<name>_<hash>.default`: for a policy of checkpointing."""
        import torch  # not before it is needed

        return getattr(torch.ops.llsa, self.module.OPERATOR).default

    def as_module(self) -> "AttentionModule":
        """A new torch module that calls this operator: a model that has it shows it, and may hook it.

        The operator is no module itself, for whoever compiles the same spec gets the same one, hooks included.
        """
        from llsa_gen.module import AttentionModule  # not before torch is needed

        return AttentionModule(self)

    def __copy__(self) -> "Attention":
        return self

    def __deepcopy__(self, memo: object) -> "Attention":
        """Itself: there is nothing in it to change, and the module that runs is one a process."""
        return self

    def _explained(self, error: Exception) -> Exception:
        """A failed Triton compile, told in terms of the templates; any other error as it is."""
        from triton.compiler.errors import CompilationError  # not before it is there anyway

        if not isinstance(error, CompilationError):
            return error
        from llsa_gen.emit.failure import locate

        found = locate(error, self.module)
        reproduce = f"python -c 'import llsa_gen; print(llsa_gen.compile({self.spec.canonical()!r}))'"
        return KernelCompileError(
            found.reason, found.function, found.line, found.template, self.spec.name, reproduce
        ).with_traceback(error.__traceback__)

    def __reduce__(self) -> "tuple[object, tuple[Spec]]":
        """Pickles, as part of a model for example, are the operator compiled from the same spec."""
        return compile, (self.spec,)

    def __repr__(self) -> str:
        return f"Attention({self.spec.name!r}, {self.path or 'in memory'})"


def compile(source: str | os.PathLike[str] | Mapping[str, object] | Spec, *, store: Store | None = None) -> Attention:
    """Compile a spec: a path, a dict or a Spec to the operator; the same object for the same spec next time.

    Tile shapes are the shipped ones, and those that `llsa-gen tune` has put into the store. Raises MissingSpecFile or
    SpecError for what is wrong with the spec, SettingError for a variable that the module does not understand.
    """
    with forks.whole():  # also what is before the lock, for the libraries that it uses have locks and caches too
        spec, store = load(source), store or Store()
        plan = lower(spec)
        schedules = schedule.schedules(plan, tuned.targets(store))
        key = cache_key(plan, schedules)
        with _lock:
            if key.digest not in _compiled:
                text, path = store.fetch(key, lambda: emit.render(plan, schedules))
                try:
                    module = load_text(spec.name, key.digest, text, path)
                except ValueError as error:  # all that a module, which knows no class of ours, has to say at its import
                    raise SettingError(str(error)) from error
                _compiled[key.digest] = Attention(spec, module, text, path)
            found = _compiled[key.digest]
            sys.modules.setdefault(found.module.__name__, found.module)  # where torch.compile looks for it by that name
            return found


def cache_key(plan: Plan, schedules: schedule.Schedules) -> Key:
    """Everything that the text of a module, and how it runs, depends on; known without rendering it."""
    package = Path(__file__).parent
    parts = {"spec": plan.spec.digest, "schedule": _digest(repr(schedules).encode())}
    parts |= {f"template:{name}": digest for name, digest in emit.template_digests().items()}
    parts |= {f"runtime:{name}": digest for name, digest in runtime.digests().items()}
    parts |= {f"generator:{name}": _digest((package / name).read_bytes()) for name in GENERATORS}
    parts |= {name: _installed(name) for name in ("torch", "triton")}
    parts["llsa_gen"] = emit.generator_version()
    return Key(plan.spec.name, parts)


def explain_miss(
    source: str | os.PathLike[str] | Mapping[str, object] | Spec, store: Store | None = None
) -> Explanation:
    """Why the next `compile` of a spec would hit or miss the store."""
    plan, store = lower(load(source)), store or Store()
    return store.why(cache_key(plan, schedule.schedules(plan, tuned.targets(store))))


_installed = cache(version)
"""The version of a package, looked up once: that reads every folder of `sys.path`."""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
