"""Settings of a run: what a YAML file and flags may say, and their defaults, which are the paper's setting.

    python examples/pixel_dit/train.py --config examples/pixel_dit/configs/small.yaml --steps 500

Every field is a flag, and a key of a YAML file. Flags win over the file, the file over the defaults.
"""

import argparse
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


def _size(value: object) -> object:
    """64, "64" or "24x40" as (height, width)."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, str):
        height, _, width = value.partition("x")
        return height, width or height
    return value


def _choice(value: object) -> object:
    """true, false or "auto", as YAML or a flag says it."""
    if isinstance(value, bool) or value == "auto":
        return value
    said = {"true": True, "false": False}.get(str(value).lower())
    if said is None:
        raise ValueError("expected auto, true or false")
    return said


Whole = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]


class Settings(BaseModel):
    """One run. Descriptions of the fields are the help of the flags."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # what is learnt from
    data: str = Field("photographs", description="folder or zip file of pictures")
    size: Annotated[tuple[Whole, Whole], BeforeValidator(_size)] = Field(
        (64, 64), description="of the windows: 64, or 24x40 for height 24"
    )
    shrink: Whole = Field(1, description="average pictures over squares of so many pixels first")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of first values, data order and noise")
    # the model
    attention: str | dict[str, Any] = Field("llsa_l2", description="a spec, dense, dense-flash, or none")
    order: Literal["2d", "raster"] = Field("2d", description="of tokens, where a spec attends")
    channels: Whole = 384
    depth: Whole = 12
    heads: Whole = 6
    layout: Literal["tokens", "heads"] = Field("tokens", description="how q, k and v lie in memory")
    modulate: Literal["weights", "tokens"] = Field("weights", description="what scales and gates multiply")
    # how it learns
    batch: Whole = Field(32, description="windows that a step learns from, on all processes together")
    accumulate: Whole = Field(1, description="parts in which a process takes its share of the batch")
    steps: Whole = 2000
    seconds: Amount = Field(0, description="end after so many seconds of training, compiling left out; 0: never")
    lr: Amount = 5e-4
    warmup: Whole = Field(100, description="steps in which the learning rate rises")
    weight_decay: Amount = 0.01
    clip: Amount = Field(1.0, description="largest norm of the gradient; 0: any")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="decay of the averaged weights; 0: none")
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    compile: Literal["model", "blocks", "none"] = Field(
        "model", description="what torch.compile takes: blocks compile six times as fast, and run a little slower"
    )
    cuda_graph: Annotated[bool | Literal["auto"], BeforeValidator(_choice)] = Field(
        "auto", description="record a step once and replay it: true, false, or auto, which is true on one GPU"
    )
    checkpointing: bool = Field(False, description="compute activations again in the backward pass")
    device: str = Field("", description="cpu or cuda; a GPU where there is one, if not given")
    # what is written, and how often
    log_every: Whole = 10
    validate_every: Whole = 500
    validation: Whole = Field(256, description="validation windows")
    checkpoint_every: Whole = 500
    samples: Annotated[int, Field(ge=0)] = Field(16, description="pictures in the sample grid; 0: no grid")
    sample_steps: Whole = 50

    @model_validator(mode="after")
    def _divided(self) -> "Settings":
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate: expected a divisor of batch {self.batch}, got {self.accumulate}")
        return self


WRITTEN = {"log_every", "validate_every", "validation", "checkpoint_every", "samples", "sample_steps"}
FREE = frozenset({"data", "steps", "seconds", "device", "cuda_graph"} | WRITTEN)
"""What a run that is resumed may change: none of it changes a step. The pictures are compared by their hashes."""


def add_flags(parser: argparse.ArgumentParser, varied: Collection[str] = ()) -> None:
    """--config and a flag for every setting, but for those that a program varies by itself."""
    parser.add_argument(
        "--config", type=Path, action="append", default=[], help="a YAML file of settings; more than one, too"
    )
    for name, field in Settings.model_fields.items():
        if name in varied:
            continue
        description = f"{field.description}; " if field.description else ""
        shown = field.default if name != "size" else 64
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="X", help=f"{description}{shown}")


def from_flags(options: argparse.Namespace) -> Settings:
    """The settings of parsed flags; ends the program with one line where one is wrong."""
    given: dict[str, Any] = {}
    for path in options.config:
        given |= read(path)
    flags = {name: getattr(options, name, None) for name in Settings.model_fields}
    given |= {name: value for name, value in flags.items() if value is not None}
    return checked(given)


def read(path: Path) -> dict[str, Any]:
    """What a YAML file says by names; ends the program with one line where it says nothing of the kind."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        sys.exit(f"{path}: expected a YAML file, got {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        sys.exit(f"{path}: expected names and values, got {type(content).__name__}")
    return content


def checked(given: dict[str, Any]) -> Settings:
    """Settings of a mapping; ends the program with one line where one is wrong."""
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][:1])
        message = first["msg"].removeprefix("Value error, ")
        sys.exit(f"{place}: {message}, got {first['input']!r}" if place else message)


def changed(old: Settings, new: Settings) -> list[str]:
    """What differs and is not `FREE`, as "name: expected old, got new"."""
    before, now = old.model_dump(), new.model_dump()
    return [
        f"{name}: expected {before[name]}, got {now[name]}"
        for name in before
        if name not in FREE and before[name] != now[name]
    ]
