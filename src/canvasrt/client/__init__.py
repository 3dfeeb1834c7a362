"""The other end of the wire: a gRPC client for `canvasrt serve`, and the load generator that is built on it."""
