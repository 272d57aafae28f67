"""The tests of operations use the same small world as the server's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
