"""A light bottleneck with DualPI2 for tests: bursts fill L, and C is empty but for the subject."""

from eloquent_netem.lab.rows import Place
from eloquent_netem.scenario import Scenario, parse_scenario

_TEXT = """
length_s = 6
[up]
delay_ms = 10
rate = { kind = "fixed", mbit_s = 10 }
[down]
delay_ms = 10
rate = { kind = "fixed", mbit_s = 10 }
queue = { kind = "dualpi2" }
[[cross]]
kind = "bursts"
direction = "down"
mbit_s = 20
burst_ms = 60
pause_ms = 300
[[cross]]
kind = "web"
direction = "up"
"""


def light() -> Scenario:
    """Return the scenario: 6 s, 10 Mbit/s, 20 ms round trip."""
    return parse_scenario(_TEXT, name="light")


def light_place() -> Place:
    """Return it as a place of a comparison."""
    return Place(name="light", scenario=light(), begins_s=0.0)
