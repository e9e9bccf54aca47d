"""The toy task's module on the import path, as a user's own would be."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
