"""Nothing here is collected unless a release stands in front of the environment and is named: `make test-legacy`.

Releases before 5 have families of their own, those from 5 on several implementations of experts.
"""

from __future__ import annotations

import os

_RELEASE = os.environ.get("MOEC_LEGACY", "")
_OTHERS = "test_families.py" if _RELEASE.startswith("5.") else "test_implementations.py"
collect_ignore_glob = [_OTHERS if _RELEASE else "test_*.py"]
