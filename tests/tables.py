"""Tables of tile shapes as tests write them."""

import json
from collections.abc import Mapping
from typing import Any

from llsa_gen.schedule import Target
from llsa_gen.schedule.table import parse


def row(stage: str, tiles: Mapping[str, Any], **when: object) -> dict[str, Any]:
    return {"stage": stage, "when": when, "set": tiles, "why": "a test"}


def table(*rows: Mapping[str, Any], name: str = "cuda:90") -> Target:
    data = {"target": name, "shared_memory": 232448, "rows": list(rows)}
    return parse(json.loads(json.dumps(data)), "test.json")
