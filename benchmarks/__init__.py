"""What weight norm costs, and what planning costs: ``python -m benchmarks``."""
