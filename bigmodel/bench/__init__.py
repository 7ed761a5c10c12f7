"""Measures a checkpoint on this machine, beside others that can run it."""
