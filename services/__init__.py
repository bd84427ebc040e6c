"""The four services, one folder per process."""
