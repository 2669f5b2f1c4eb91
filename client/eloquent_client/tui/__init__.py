"""The terminal chat; needs the extra `chat`, so nothing outside imports it but the command."""
