"""Policies: what replies, and the renderer between messages and tokens."""
