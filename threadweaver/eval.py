"""`python -m threadweaver.eval`: the short name of `python -m threadweaver.evaluate`."""

import sys

from threadweaver.evaluate.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
