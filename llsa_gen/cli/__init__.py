"""The command line, `llsa-gen`: one file a command."""

from llsa_gen.cli.commands import app, main

__all__ = ["app", "main"]
