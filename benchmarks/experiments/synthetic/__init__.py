"""Random distributions: how well output layers of small dimension match targets from a Dirichlet distribution."""

from .experiment import Synthetic as Synthetic
