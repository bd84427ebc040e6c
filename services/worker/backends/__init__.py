"""Compute backends: what computes a rank's steps, and on which memory. Models speak to the interface alone."""
