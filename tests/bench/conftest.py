"""What these tests run in: `place`, a working directory with a spec and a store of its own."""

from commands import place as place
