"""`python -m fastdpo` is `fastdpo`."""

import sys

from fastdpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
