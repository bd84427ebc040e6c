"""What is here runs in processes of its own, which tests/unit/test_triton_kernels.py starts."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]
