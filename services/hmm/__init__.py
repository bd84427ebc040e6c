"""The HMM: owns all device memory of one host, fills it from a checkpoint, hands it to ranks, survives its restart."""
