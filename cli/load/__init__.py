"""Load on an OpenAI endpoint: the one client of `elasticmoe load`, the benchmarks and chaos."""
