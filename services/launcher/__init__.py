"""Starts a whole cluster on one machine: the same processes with the same configuration files as in Kubernetes."""
