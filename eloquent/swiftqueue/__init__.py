"""SwiftQueue: which of a router's two L4S queues each packet goes into (arXiv 2410.06112).

A sender-side predictor learns from the one-way delays that the receiver reports what a packet
would meet in the L and in the C queue, and a marking policy chooses. Nothing here has sockets, a
clock or asyncio; torch is needed for training alone.
"""
