"""The schedule: tile shapes of every kernel, from tables of what was measured (`tables/`) or, failing those, rules."""

from llsa_gen.schedule.columns import Columns, columns_of, take_turns
from llsa_gen.schedule.rules import (
    PARTIAL_LEVELS,
    Choice,
    Entry,
    Schedule,
    Schedules,
    choices,
    list_length,
    schedule,
    schedules,
)
from llsa_gen.schedule.table import Target, pad, target, targets

__all__ = [
    "PARTIAL_LEVELS",
    "Choice",
    "Columns",
    "Entry",
    "Schedule",
    "Schedules",
    "Target",
    "choices",
    "columns_of",
    "list_length",
    "pad",
    "schedule",
    "schedules",
    "take_turns",
    "target",
    "targets",
]
