import sys

from benchmarks.smoke.command import main

sys.exit(main())
