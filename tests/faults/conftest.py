"""The fault tests use the small jobs of the stage's own tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tokenize_stage"))
