"""Scaling policies in virtual time: traffic against a simulated deployment, and what came of it."""
