"""The workloads; each module has ``cells(size)``."""
