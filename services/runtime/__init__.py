"""What every service needs and none is about: configuration, logs, gRPC, etcd, membership. No torch."""
