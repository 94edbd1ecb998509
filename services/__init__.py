"""The services of infinite-llm; each runs as ``python -m services.<name>``."""
