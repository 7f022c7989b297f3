"""Accuracy: the built-in models, the study, the paper's tables and figures."""
