"""The worker pool: starts, watches and ends rank processes."""
