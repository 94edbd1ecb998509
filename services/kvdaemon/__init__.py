"""The KV daemon: owns one pool of rBlocks, says who holds which, and computes attention on them where they lie."""
