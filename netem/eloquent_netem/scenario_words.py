"""What a scenario does, in words and figures."""

from eloquent_netem.scenario import Scenario
from eloquent_netem.scenario_parts import DOWN, UP

HEADINGS = {UP: "up (client to server)", DOWN: "down (server to client)"}


def describe(scenario: Scenario) -> str:
    """Return a few lines on the path, each direction, and the cross traffic."""
    rtt_ms = scenario.up.delay_ms + scenario.down.delay_ms
    lines = [f"{scenario.name}: {scenario.description}" if scenario.description else scenario.name]
    lines += [
        f"  {scenario.length_s:g} s, round trip {rtt_ms:g} ms without queues and jitter, "
        f"seed {scenario.seed} unless given"
    ]
    lines += [f"  both ways: {outage.words()}" for outage in scenario.outages]
    for name, heading in HEADINGS.items():
        lines.append(f"  {heading}")
        lines += [f"    {line}" for line in scenario.direction(name).words()]
    lines += [f"  cross traffic: {flow.words(scenario.rtt_ms(flow))}" for flow in scenario.cross]
    return "\n".join(lines)
