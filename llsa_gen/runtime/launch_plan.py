"""What is worked out once for all calls that are alike: buffers, tile shapes, and how a pass is launched."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton

if TYPE_CHECKING:
    from llsa_gen.runtime.backend import in_triton
    from llsa_gen.runtime.driver import words_of
    from llsa_gen.runtime.module import LAYOUTS, LEVELS, OPERATOR, ROW_UNIT, SCHEDULES, saved_shapes, work_out
    from llsa_gen.runtime.replay import PLAIN, Argument, Capture, by_triton, by_what_is_ready, give_up, is_watched, tell

# ---- spliced into every module from here on


Extras = tuple[str, ...]
Widths = tuple[int, ...]


def ceil_div(a: int, b: int) -> int:
    """ceil(a / b)."""
    return -(-a // b)


def own_dtypes(layout: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The buffers of a layout and their dtypes; partial sums are rounded as the whole is, if that has the range."""
    own: dict[Any, Any] = {"input": dtype, "partial": dtype if dtype == torch.bfloat16 else torch.float32}
    return {name: own.get(known, known) for name, known in LAYOUTS[layout].items()}


def lay_out(layout: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[list[tuple[int, int]], int]:
    """Where each buffer of a layout begins, at a multiple of 256, and ends in its memory; its length. In bytes.

    What is saved lies head by head: these are the places and the length of one.
    """
    places, size = [], 0
    for name, own in own_dtypes(layout, dtype).items():
        length = math.prod(shapes[name]) * own.itemsize
        places.append((size, size + length))
        size += ceil_div(length, 256) * 256
    return places, size


def views_of(
    memory: torch.Tensor, layout: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> list[torch.Tensor]:
    """The buffers of a layout as tensors in its memory; `saved` is [B, H, bytes], and so are they, [B, H, ...]."""
    places, _ = lay_out(layout, shapes, dtype)
    return [
        memory[..., begin:end].view(own).unflatten(-1, shapes[name])
        for (begin, end), (name, own) in zip(places, own_dtypes(layout, dtype).items(), strict=True)
    ]


def named_views(at: Any, like: Sequence[torch.Tensor] = (), **memories: torch.Tensor) -> dict[str, torch.Tensor]:
    """The buffers of some layouts by name, in their memory: of a `LaunchPlan`, or only `saved`, for q and k `like`."""
    found: dict[str, torch.Tensor] = {}
    for layout, memory in memories.items():
        shapes, dtype = (at.shapes, at.dtype) if at else (saved_shapes(*[x.shape[2] for x in like]), like[0].dtype)
        found |= zip(LAYOUTS[layout], views_of(memory, layout, shapes, dtype), strict=True)
    return found


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of the shape, the dtype and the device of `x`; `new_empty` takes torch twice as long."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty_saved(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Memory for what the forward pass over `q` and `k` leaves to the backward pass, [B, H, bytes].

    Never empty: torch.export 2.15 asks whether it may be, and of a symbol's formula it can't tell.
    """
    _, size = lay_out("saved", saved_shapes(q.shape[2], k.shape[2]), q.dtype)
    length: Any = torch.sym_max(size, 256)
    return q.new_empty((*q.shape[:2], length), dtype=torch.uint8)


def empty_outputs(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator's outputs for inputs like `q` and `k`, not filled in: o, lse and what is saved."""
    return empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32), empty_saved(q, k)


def empty_selection(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """The kept tokens of each level, finest first, not filled in."""
    shapes = saved_shapes(q.shape[2], k.shape[2])
    return [q.new_empty((*q.shape[:2], *shapes[f"kept_l{level}"]), dtype=torch.int32) for level in range(1, LEVELS + 1)]


def is_aligned(stride: Sequence[int]) -> bool:
    """Whether a row's elements lie side by side, and rows begin at multiples of ROW_UNIT elements."""
    batches, heads, rows, step = stride
    return step == 1 and (batches | heads | rows) % ROW_UNIT.value == 0


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if its rows do not lie as kernels need them: see `is_aligned`.

    Not by `contiguous`, which leaves the stride of a single row as it is: kernels make addresses of rows beyond it too.
    """
    return x if is_aligned(x.stride()) else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def target_of(device: torch.device) -> str:
    """A GPU as the schedules name it; for one that they do not know, the nearest older one, or the oldest."""
    if device.type != "cuda":
        return "cuda:80"  # the interpreter, for which any schedule will do
    if torch.version.hip:
        return "hip:gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    known = [int(target.split(":")[1]) for target in SCHEDULES if target.startswith("cuda")]
    return f"cuda:{max((arch for arch in known if arch <= 10 * major + minor), default=min(known))}"


def schedule_for(target: str, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Tile shapes of every kernel for a target and a dtype."""
    return SCHEDULES[target][dtype.itemsize]


def plan_launches(
    tensors: Sequence[torch.Tensor], extras: Extras = (), g_tokens: int = 0, given: Widths = ()
) -> tuple[Any, ...]:
    """The `LaunchPlan` for q, k, ... [B, H, N, D]; q, k, ..., `aligned`.

    Triton also tells apart where a row begins, at a multiple of 16 bytes or not, and which `extras` there are beside.
    Lists that are `given`, of these widths, may have gaps where those of the selection have none.
    """
    q, k, *_ = tensors
    strides = tuple([x.stride() for x in tensors])
    starts = tuple([x.data_ptr() % 16 for x in tensors])
    at = launch_plan(q.device, q.dtype, q.shape, k.shape, strides, starts, extras, g_tokens, given)
    return (at, *tensors) if at is not None else plan_launches([aligned(x) for x in tensors], extras, g_tokens, given)


@functools.lru_cache(maxsize=2048)
def launch_plan(
    device: torch.device, dtype: torch.dtype, q_shape: torch.Size, k_shape: torch.Size,
    strides: tuple[tuple[int, ...], ...], starts: tuple[int, ...], extras: Extras, g_tokens: int, given: Widths,
) -> "LaunchPlan | None":  # fmt: skip
    """One `LaunchPlan` for all calls that Triton does not tell apart; None where tensors have to be copied first."""
    if not all(map(is_aligned, strides)):
        return None
    tiles = schedule_for(target_of(device), dtype)
    return LaunchPlan(device, dtype, q_shape, k_shape, strides, starts, tiles, extras, g_tokens, given)


class LaunchPlan:
    """What depends on shapes, strides, dtype and device alone, worked out at the first call with them.

    rows: [B, H, M]. steps: between batches, heads and rows of each tensor. shapes: of every buffer. places, sizes: of
    buffers in the memory of each layout and of that memory, see `lay_out`. grids: programs and tile shapes of every
    launch. extras: names of the tensors that a pass takes beside those that it always takes, in their order.
    ready: what Triton made of each launch, so that it need not look for it again. replays: the launches of each pass,
    from its first call on, or None where that cannot be replayed. What else there is, `work_out` says.
    """

    shapes: dict[str, tuple[int, ...]]
    grids: dict[str, tuple[int, dict[str, Any]]]

    def __init__(
        self, device: torch.device, dtype: torch.dtype, q_shape: torch.Size, k_shape: torch.Size,
        strides: tuple[tuple[int, ...], ...], starts: tuple[int, ...], tiles: dict[str, dict[str, Any]],
        extras: Extras = (), g_tokens: int = 0, given: Widths = (),
    ) -> None:  # fmt: skip
        self.device, self.dtype, self.extras, self.g_tokens, self.given = device, dtype, extras, g_tokens, given
        batch, self.heads_per_batch, self.m_tokens = self.rows = q_shape[:3]
        self.heads, self.kv_heads, self.n_tokens = batch * self.heads_per_batch, batch * k_shape[1], k_shape[2]
        self.steps = [stride[:3] for stride in strides]
        # the kernels in Gluon copy 16 bytes at a time, and multiply a stride in 32 bits
        if any(starts) or any(stride[2] >= 2**30 for stride in strides):
            tiles = {stage: in_triton(entry) for stage, entry in tiles.items()}
        work_out(self, tiles)
        self.places, self.sizes = {}, {}
        for layout in LAYOUTS:
            self.places[layout], self.sizes[layout] = lay_out(layout, self.shapes, dtype)
        self.saved_step = self.sizes["saved"] // 256
        heads: dict[str, tuple[int, ...]] = {"saved": (batch, self.heads_per_batch)}
        self.memories = {layout: (*heads.get(layout, ()), size) for layout, size in self.sizes.items()}
        self.ready: dict[str, Any] = {}
        self.replays: dict[Callable[..., None], Any] = {}

    def memory(self, layout: str) -> torch.Tensor:
        """One piece of memory for all buffers of a layout."""
        # sizes one by one: torch takes half a microsecond longer for a tuple
        return torch.empty(*self.memories[layout], dtype=torch.uint8, device=self.device)

    def named(self, extras: Sequence["Argument"], *names: str) -> list["Argument | None"]:
        """The extra tensors of these names; None where there is none."""
        known = dict(zip(self.extras, extras, strict=True))
        return [known.get(name) for name in names]

    def buffers(self, memory: Any, layout: str) -> list["Argument"]:
        """The buffers of a layout in its memory, an `Argument`: an `Argument` each."""
        views = views_of(memory.value, layout, self.shapes, self.dtype)
        return [Argument(view, memory.base, begin) for view, (begin, _) in zip(views, self.places[layout], strict=True)]

    def run(self, launches: Callable[..., None], tensors: Sequence[torch.Tensor], scale: float = 0.0) -> None:
        """Launch a pass, whose function `launches` names its kernels in order, over tensors alike at every call.

        The kernels read and write only these and, at `Argument.offset`, what lies in them; lengths and strides stay.
        """
        error = 0
        if PLAIN:
            self.launch(launches, functools.partial(by_triton, self), tensors, scale)
        elif launches in self.replays:
            try:
                error = self.replay(launches, tensors, scale)
            except Exception as reason:
                # Some kernels may be launched already. All are again, from those on that clear what others count in.
                # What is wrong with more than the way of launching, Triton says.
                self.launch(launches, functools.partial(by_triton, self), tensors, scale)
                give_up(reason)
        else:
            capture = Capture(self)
            self.launch(launches, capture, tensors, scale)
            if not capture.unknown:
                self.replays[launches] = capture.replay()
                if capture.why is not None:
                    tell(capture.why)
        if error:
            raise RuntimeError(f"{OPERATOR}: CUDA error {error} at a launch: {words_of(error)}")

    def replay(self, launches: Callable[..., None], tensors: Sequence[torch.Tensor], scale: float) -> int:
        """Launch a pass from its second call on; what the driver says of the launch that fails, or 0."""
        replay = self.replays[launches]
        if replay is not None and not is_watched():
            stream: int = triton.runtime.driver.active.get_current_stream(self.device.index)  # type: ignore[attr-defined]
            return replay.run(stream, scale, tensors)
        self.launch(launches, functools.partial(by_what_is_ready, self), tensors, scale)
        return 0

    def launch(
        self, launches: Callable[..., None], launch: Callable[..., None], tensors: Sequence[torch.Tensor], scale: float
    ) -> None:
        """Launch a pass, each of its kernels by `launch`."""
        launches(self, launch, Argument(scale, 1), *[Argument(x, 2 + i) for i, x in enumerate(tensors)])
