"""Benchmarks: a spec beside torch's dense attention in one process, as rows, tables and plots."""

from llsa_gen.bench.request import Request, bench

__all__ = ["Request", "bench"]
