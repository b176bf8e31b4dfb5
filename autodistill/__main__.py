"""`python -m autodistill`, for use when the command is not on the path."""

import sys

from autodistill.cli.app import main

sys.exit(main())
