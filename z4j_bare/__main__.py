"""Entry point of ``python -m z4j_bare``."""

import sys

from z4j_bare.cli import main

sys.exit(main())
