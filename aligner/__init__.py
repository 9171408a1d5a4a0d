"""Align large language models with human preferences."""
