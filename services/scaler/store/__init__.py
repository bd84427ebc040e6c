"""What outlives a scaler: the journal, the lease, and how they are found again."""
