"""``benchmarks/results/REPORT.md``: what the stored results say, claim by claim, and what to do about it."""
