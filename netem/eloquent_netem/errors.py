"""The errors that netem raises on purpose."""


class NetemError(Exception):
    """Base of what netem raises on purpose; its text is fit for the user."""
