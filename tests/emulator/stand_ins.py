"""What kernels in Triton do around those in Gluon, in a few lines of torch: the selection is the reference's."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llsa_gen import reference
from llsa_gen.aot.launches import Launch
from llsa_gen.spec import Spec

Arguments = Mapping[str, Any]


def flat(x: Tensor) -> Tensor:
    """Batch and heads as one: [B*H, ...] of [B, H, ...]."""
    return x.reshape(-1, *x.shape[2:])


def fill(to: Tensor, values: Tensor) -> None:
    """Write values into a buffer of as many elements, whatever its strides."""
    to.copy_(values.reshape(to.shape).to(to.dtype))


class StandIns:
    """Runs launches of one forward and one backward pass, in order."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.known: dict[str, Any] = {}
        """The last argument of each name."""
        self.kept: dict[int, Tensor] = {}
        """Lists, [B, H, T_l(M), width], by level."""
        self._makers: tuple[tuple[str, Callable[..., None]], ...] = (
            (r"pool_l\d_kernel", self._pool),
            (r"select_l(\d)_kernel", self._select),
            (r"keep_kernel", self._keep),
            (r"scan_kernel", self._scan),
            (r"invert_l(\d)_kernel", self._invert),
            (r"grad_kv_global_kernel", self._split_globals),
            (r"grad_kv_global_sum_kernel", self._sum_of_globals),
            (r"grad_kv_l(\d)_sum_kernel", self._sum),
            (r"grad_kv_l(\d)_(overflow_)?kernel", self._by_list),
        )

    def note(self, launch: Launch) -> None:
        """Remember what a launch is given, whoever runs it."""
        self.known |= launch.arguments

    def run(self, launch: Launch) -> None:
        """Do what a kernel in Triton does."""
        for pattern, make in self._makers:
            match = re.fullmatch(pattern, launch.kernel)
            if match:
                make(launch.arguments, *(int(one) if one and one.isdigit() else bool(one) for one in match.groups()))
                return
        raise NotImplementedError(f"{launch.kernel}: has no stand-in")

    # ---- the forward pass

    def _pool(self, given: Arguments) -> None:
        for name in "qkv":
            for level in range(1, self.spec.num_levels + 1):
                to = given.get(f"{name}_l{level}_ptr")
                if to is not None:
                    fill(to, reference.pool(self.known[f"{name}_ptr"], self.spec.span(level)))

    def _select(self, given: Arguments, level: int) -> None:
        lists = reference.select(self.spec, self.known["q_ptr"], self.known["k_ptr"])[level - 1]
        self._have(given, level, lists)

    def _keep(self, given: Arguments) -> None:
        for level in range(1, self.spec.num_levels + 1):
            lists, width = given[f"given_l{level}_ptr"], given[f"width_l{level}"]
            order = (lists < 0).to(torch.int8).argsort(dim=-1, stable=True)
            packed = lists.gather(-1, order)[..., :width]
            self._have(given, level, torch.nn.functional.pad(packed, (0, width - packed.shape[-1]), value=-1))

    def _have(self, given: Arguments, level: int, lists: Tensor) -> None:
        fill(given[f"kept_l{level}_ptr"], lists)
        self.kept[level] = lists

    # ---- inverted lists

    def _scan(self, given: Arguments) -> None:
        for level, lists in self.kept.items():
            tokens = reference.num_tokens(self.spec, level, given["n_tokens"])
            counts = (flat(lists).flatten(1)[..., None] == torch.arange(tokens)).sum(1)
            self._running(given, f"offsets_l{level}_ptr", counts)
            if f"overflow_l{level}_ptr" in given:
                self._running(given, f"overflow_l{level}_ptr", (-(-counts // given[f"part_l{level}"]) - 1).clamp(min=0))

    def _running(self, given: Arguments, name: str, counts: Tensor) -> None:
        fill(given[name], torch.nn.functional.pad(counts.cumsum(1), (1, 0)))

    def _invert(self, given: Arguments, level: int) -> None:
        keepers = given[f"keepers_l{level}_ptr"]
        for head, lists in enumerate(flat(self.kept[level])):
            rows, slots = (lists >= 0).nonzero(as_tuple=True)
            order = lists[rows, slots].argsort(stable=True)
            keepers[head, : len(order)] = rows[order].to(keepers.dtype)

    def _keepers(self, head: int, level: int, token: int) -> Tensor:
        begin, end = self.known[f"offsets_l{level}_ptr"][head, token : token + 2].tolist()
        return self.known[f"keepers_l{level}_ptr"][head, begin:end].long()

    # ---- gradients of keys and values

    def _sum_of_globals(self, given: Arguments) -> None:
        for name in "kv":
            fill(given[f"grad_{name}_global_ptr"], given[f"partial_grad_{name}_global_ptr"].float().sum(1))

    def _sum(self, given: Arguments, level: int) -> None:
        for name in "kv":
            to, partial = given[f"grad_{name}_l{level}_ptr"], given[f"partial_grad_{name}_l{level}_ptr"].float()
            if level == self.spec.num_levels:
                fill(to, partial.sum(1))
                continue
            block, up = self.spec.block(level + 1), level + 1
            lists, sums = flat(self.kept[up]), torch.zeros(to.shape)
            partial = partial.sum(2)  # of splits
            for head, row, slot in (lists >= 0).nonzero().tolist():
                first = int(lists[head, row, slot]) * block
                here = sums[head, first : first + block]
                here += partial[head, row, slot * block : slot * block + len(here)]
            fill(to, sums + self._handed_down(given, name, level, to.shape[1]))

    def _handed_down(self, given: Arguments, name: str, level: int, tokens: int) -> Tensor:
        for above in range(level + 1, self.spec.num_levels + 1):
            grad = given.get(f"grad_{name}_l{above}_ptr")
            if grad is not None:
                return grad[:, torch.arange(tokens) * self.spec.span(level) // self.spec.span(above)]
        return torch.zeros(len(flat(self.known["k_ptr"])), tokens, self.spec.head_dim)

    def _split_globals(self, given: Arguments) -> None:
        mask, queries = given["global_mask_ptr"], torch.arange(given["m_tokens"])
        partial = [given[f"partial_grad_{name}_global_ptr"] for name in "kv"]
        for head, tos in enumerate(zip(*partial, strict=True)):
            made = self._gradients(head, "_global", torch.arange(given["g_tokens"]), queries)
            if mask is not None:
                made[:, ~mask[head // given["heads_per_batch"]].bool()] = 0.0
            for to, grad in zip(tos, made, strict=True):
                to.zero_()
                to[0] = grad.to(to.dtype)

    def _split(self, given: Arguments, level: int) -> None:
        """Partial sums, all of them in the first split."""
        up, n, m = level + 1, given["n_tokens"], given["m_tokens"]
        covered = reference.covered_tokens(self.spec, level, n)
        partial = [given[f"partial_grad_{name}_l{level}_ptr"] for name in "kv"]
        for to in partial:
            to.zero_()
        for head in range(len(partial[0])):
            if level == self.spec.num_levels:
                made = self._gradients(head, f"_l{level}", torch.arange(len(covered)), torch.arange(m))
                made = made / covered[:, None]
                for to, grad in zip(partial, made, strict=True):
                    to[head, 0] = grad.to(to.dtype)
                continue
            block, span = self.spec.block(up), self.spec.span(up)
            lists = flat(self.kept[up])[head]
            for row, slot in (lists >= 0).nonzero().tolist():
                first = int(lists[row, slot]) * block
                keys = torch.arange(first, min(first + block, len(covered)))
                queries = torch.arange(row * span, min(row * span + span, m))
                made = self._gradients(head, f"_l{level}", keys, queries) / covered[keys, None]
                for to, grad in zip(partial, made, strict=True):
                    to[head, row, 0, slot * block : slot * block + len(keys)] = grad.to(to.dtype)

    def _by_list(self, given: Arguments, level: int, overflow: bool) -> None:
        if f"partial_grad_k_l{level}_ptr" in given:
            return self._split(given, level)
        up, block, part = level + 1, self.spec.block(level + 1), given["PART"]
        n, m = given["n_tokens"], given["m_tokens"]
        tokens = reference.num_tokens(self.spec, level, n)
        for head in range(len(flat(self.known["q_ptr"]))):
            whole = torch.zeros((2, tokens, self.spec.head_dim), dtype=torch.float64)
            for parent in range(reference.num_tokens(self.spec, up, n)):
                keepers = self._keepers(head, up, parent)
                keys = torch.arange(parent * block, min(parent * block + block, tokens))
                parts = keepers[part:].split(part) if overflow else (keepers,)
                for number, some in enumerate(parts if len(keepers) > part or not overflow else ()):
                    queries = (some[:, None] * self.spec.span(up) + torch.arange(self.spec.span(up))).flatten()
                    made = self._gradients(head, f"_l{level}" if level else "", keys, queries[queries < m])
                    if overflow:
                        at = int(self.known[f"overflow_l{up}_ptr"][head, parent]) + number
                        for name, grad in zip("kv", made, strict=True):
                            given[f"overflow_grad_{name}_l{level}_ptr"][head, at, : len(keys)] = grad.float()
                    whole[:, keys] = made
            if not overflow:
                covered = torch.as_tensor(reference.covered_tokens(self.spec, level, n) if level else 1.0)
                for name, grad in zip("kv", whole / covered.reshape(-1, 1), strict=True):
                    to = given[f"grad_{name}_l{level}_ptr" if level else f"grad_{name}_ptr"]
                    handed = self._handed_down(given, name, level, tokens)
                    flat_to = to if level else to.view(-1, *to.shape[2:])
                    flat_to[head] = (grad + handed[head]).to(to.dtype)

    def _gradients(self, head: int, which: str, keys: Tensor, queries: Tensor) -> Tensor:
        """dk and dv [2, keys, D] of these queries, where those see these keys of a level, `_l1`, or of no name."""
        k, v = (flat(self.known[f"{name}{which}_ptr"])[head, keys].double() for name in "kv")
        q, grad = (flat(self.known[name])[head, queries].double() for name in ("q_ptr", "grad_o_ptr"))
        scale, peak = self.known["scale"], flat(self.known["peak_ptr"])[head, queries].double()
        delta = self.known["delta_ptr"].reshape(-1, self.known["m_tokens"])[head, queries].double()
        bias = torch.zeros(len(keys), dtype=torch.float64)
        if which.startswith("_l") and self.spec.reweight:
            covered = reference.covered_tokens(self.spec, int(which[2:]), self.known["n_tokens"])
            bias = covered[keys].double().log2()
        p = torch.exp2(q @ k.mT * scale * math.log2(math.e) + bias - peak[:, None])
        ds = scale * p * (grad @ v.mT - delta[:, None])
        return torch.stack([ds.mT @ q, p.mT @ grad])
