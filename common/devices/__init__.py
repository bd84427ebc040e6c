"""Device memory: one interface (`base.Device`) and its backends. The HMM creates and exports, ranks import and map."""
