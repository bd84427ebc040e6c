"""Which rank computes a request, and the streams of its tokens."""
