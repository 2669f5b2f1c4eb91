"""Eloquent: LLM chat that does not stall on bad networks."""

__version__ = "0.1.0"
