"""The data plane: attention queries, partial states and block contents between processes."""
