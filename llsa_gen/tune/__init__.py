"""Tuning: a search for tile shapes on the GPU of this machine; the winners are rows of its own tables."""

from llsa_gen.tune.tuner import Report, tune

__all__ = ["Report", "tune"]
