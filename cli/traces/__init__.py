"""Traffic that was recorded or is drawn: when requests arrive, and how many tokens they bring and want."""
