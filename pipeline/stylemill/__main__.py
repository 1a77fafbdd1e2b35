"""`python -m stylemill` runs the `stylemill` command."""

import sys

from stylemill.cli import main

sys.exit(main())
