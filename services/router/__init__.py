"""The front door: OpenAI-compatible REST, tokenization, admission, choice of replica, streams."""
