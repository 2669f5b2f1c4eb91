"""The engine: decodes the answers of several turns at once on torch."""
