"""`python -m bascule` is the command `vla`."""

import sys

from bascule.main import main

sys.exit(main())
