"""What the cluster is deployed with."""
