"""Environments: the conversation partners of the policy. Named by import path; there is no registry."""
