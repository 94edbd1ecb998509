"""The planner: which rBlocks of running requests should lie where, and where new requests should start. Pure."""
