"""From one layout to the next: stage, commit, release, abort."""
