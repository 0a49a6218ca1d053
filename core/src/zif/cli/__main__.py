"""`python -m zif.cli`, for when the `zif` script is not on the path."""

import sys

from zif.cli.main import main

sys.exit(main())
