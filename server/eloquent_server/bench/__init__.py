"""Benchmarks of the server's parts; `eloquent bench`."""
