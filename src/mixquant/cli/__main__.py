"""`python -m mixquant.cli`, the same as `mixquant`."""

import sys

from mixquant.cli import main

sys.exit(main())
