"""Speed and memory against other libraries, in one command: ``python -m benchmarks``; see ``docs/performance.md``."""
