"""The gateway: client streams, tokenizer, HTTP and public gRPC API, request journal."""
