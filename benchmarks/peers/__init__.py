"""Servers that a benchmark measures against each other: this project's, and others', in environments of their own."""
