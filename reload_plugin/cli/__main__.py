"""``python -m reload_plugin.cli``."""

import sys

from .app import main

sys.exit(main())
