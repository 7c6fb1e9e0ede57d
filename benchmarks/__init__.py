"""What a memory costs, measured: one module for each benchmark, results in results/, docs/performance.md of them."""
