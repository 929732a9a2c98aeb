"""``python -m reload_plugin.cli``."""

import sys

from . import main

sys.exit(main())
