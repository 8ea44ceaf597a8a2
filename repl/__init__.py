"""Replication: the deterministic machine (this package) and the edges that drive it (`edge`)."""
