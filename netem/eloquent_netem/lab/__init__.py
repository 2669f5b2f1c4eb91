"""The lab: the transport on emulated networks. The only part of netem that knows Eloquent."""
