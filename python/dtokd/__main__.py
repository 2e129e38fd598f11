"""`python -m dtokd` is `dtokd`."""

import sys

from .cli import main

sys.exit(main())
