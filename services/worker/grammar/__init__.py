"""Grammars that outputs keep to: matchers, made and advanced in threads of their own beside the rank's loop."""
