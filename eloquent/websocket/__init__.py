"""The lowest rung: a channel over WebSocket over TLS over TCP, for paths without UDP."""
