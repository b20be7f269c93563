"""``python -m pyro_genmodels``: the command line."""

import sys

from pyro_genmodels.cli import main

if __name__ == "__main__":
    sys.exit(main())
