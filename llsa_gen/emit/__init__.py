"""Emission: a plan and its schedules to the text of one module, and the way back from a line of it to a template."""

from llsa_gen.emit.module import TEMPLATES, environment, generator_version, render, template_digests

__all__ = ["TEMPLATES", "environment", "generator_version", "render", "template_digests"]
