"""The command `elasticmoe`: starts, watches and uses a deployment on one machine. Nothing in `services` imports it."""
