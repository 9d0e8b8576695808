"""Effective ranks and spectra of log-probability matrices, before and after f: of random factors and trained heads."""
