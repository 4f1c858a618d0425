"""The decode engine: a whole decode step of a host, sparse or dense, without waits."""
