"""Lets the tests of this folder import `recfast_oracle`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
