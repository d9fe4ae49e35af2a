"""``python -m spos_fast`` is ``spos-fast``."""

import sys

from spos_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
