"""Ranks that are attached: what each has mapped, and who is a member."""
