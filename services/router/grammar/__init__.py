"""What an answer has to look like: from a request's words to a grammar that ranks follow."""
