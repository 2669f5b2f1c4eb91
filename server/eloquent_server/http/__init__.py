"""The HTTP front: the same turns as over QUIC, for programs that speak OpenAI's API."""
