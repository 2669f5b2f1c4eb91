"""The subcommand `eloquent lab`."""

from cyclopts import App

lab = App(name="lab", help="Measure the transport on emulated networks.")
