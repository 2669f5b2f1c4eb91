"""The binding of the transport to QUIC (aioquic), and its endpoints."""
