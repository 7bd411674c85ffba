"""The declaration: what a spec may say, read from YAML, a dict or Python, with the place of every mistake."""

from llsa_gen.spec.model import MAX_LEVELS, Level, Spec, json_schema, load, schema_text
from llsa_gen.spec.starter import commented, starter

__all__ = ["MAX_LEVELS", "Level", "Spec", "commented", "json_schema", "load", "schema_text", "starter"]
