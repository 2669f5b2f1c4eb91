"""A network-emulation lab: one link model, several drivers."""
