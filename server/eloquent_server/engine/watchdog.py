"""Noticing an engine that neither works nor ends.

A process that has died closes its channel; one that is stuck (a driver that does not return, a
stopped process) says nothing, which a long prefill does, too. So the engine is asked now and then
how many steps it has begun, and judged by that while it has work.
"""

HANG_S = 60.0
"An engine with work that begins no step for so long is stuck. A step takes 0.15 s, or 0.45 s."

CHECKS = 4
"Questions in that time. They are counted instead of seconds, so that a machine which slept, or a \
server that was held up, has nobody killed."


class Watchdog:
    """Of one run of the engine's process."""

    def __init__(self) -> None:
        self._steps = -1
        self._idle_checks = 0

    def on_message(self) -> None:
        """The engine said something of a turn."""
        self._idle_checks = 0

    def is_stuck(self, *, has_work: bool, steps: int | None) -> bool:
        """Judge the answer to a question; `steps` None: there was none."""
        if not has_work or (steps is not None and steps != self._steps):
            self._idle_checks = 0
        else:
            self._idle_checks += 1
        self._steps = self._steps if steps is None else steps
        return self._idle_checks >= CHECKS
