"""``python -m llsa_gen``: the command line, also where the script ``llsa-gen`` is not on the path."""

import sys

from llsa_gen.cli import main

if __name__ == "__main__":
    sys.exit(main())
