"""The package is imported from its folder, as long as it is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent.parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))
