"""The instance: an engine that computes the model over KV memory that lies anywhere in the cluster."""
