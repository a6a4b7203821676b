"""Metrics of texts and of distributions; each docstring has definition, unit and source."""
