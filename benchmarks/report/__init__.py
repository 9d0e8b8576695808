"""REPORT.md: which output layer to use, claim by claim, and the sections of the experiments."""
