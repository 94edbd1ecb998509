"""Pure types and rules shared by all services: no I/O, no gRPC, no torch."""
