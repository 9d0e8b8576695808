"""Word-level language models on real text with any of the output layers."""

from .experiment import LanguageModels as LanguageModels
