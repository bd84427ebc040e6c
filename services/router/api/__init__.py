"""The REST surface: one file per family of endpoints, and what they share."""
