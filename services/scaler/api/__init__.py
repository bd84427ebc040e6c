"""What the admin listener takes and answers."""
