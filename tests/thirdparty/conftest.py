"""Nothing here is collected unless the packages stand in front of the environment: `make test-thirdparty`."""

from __future__ import annotations

import os

collect_ignore_glob = [] if "MOEC_THIRDPARTY" in os.environ else ["test_*.py"]
