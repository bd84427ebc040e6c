"""Traces: spans of requests and operations, for a collector that speaks OTLP."""
