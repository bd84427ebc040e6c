"""What the HMM holds: device memory, records, KV handles, copies between devices."""
