"""Responses as files: written in stages that can be stopped anywhere, filtered, counted, read back."""
