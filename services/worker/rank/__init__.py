"""A rank's loop: messages, steps, reports."""
