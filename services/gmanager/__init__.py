"""The gManager: the cluster's view of itself, rebuilt from heartbeats."""
