"""Measures of a distilled student; each docstring says what is counted, in which unit, by which source."""
