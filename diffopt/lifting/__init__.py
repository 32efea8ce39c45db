"""Optimizers of other libraries as pure update rules."""
