"""What the scaler does next: one reconciler, what it goes on from, and what carries its actions out."""
