"""The names of what can be drawn, apart from `generate`, whose numpy a command line should not load to print its help.

Pure.
"""

from __future__ import annotations

# How long each is where nobody says, in seconds.
PROFILES = {"conversation": 3600.0, "code": 3600.0, "day": 86_400.0, "step": 480.0}
DURATION_S_MAX = 31 * 86_400.0
STEP_BEGIN_S, STEP_S, STEP_FACTOR = 180.0, 120.0, 3.0
