"""The client's session with one server: turns that outlive the connections they run over."""
