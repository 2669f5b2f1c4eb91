"""The transport without I/O: wire format, token log, senders, receiver.

Nothing here has a socket, a clock, an event loop or a random source; time is an argument.
"""
