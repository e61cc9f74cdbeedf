"""`python -m normlab` is the command `normlab`."""

import sys

from normlab.cli import main

sys.exit(main())
