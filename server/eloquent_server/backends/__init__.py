"""Backends: what generates the answers."""
