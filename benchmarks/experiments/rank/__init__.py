"""Effective ranks and spectra of log-probability matrices: of random factors, with noise, and of trained heads."""

from .experiment import Rank as Rank
