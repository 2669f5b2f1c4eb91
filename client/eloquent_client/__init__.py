"""The client: a library, `eloquent ask` and the terminal chat."""
