"""The makers of small token sets that the contract's tests use serve here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "manifests"))
