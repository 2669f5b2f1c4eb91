"""The programs inside the namespaces of `eloquent lab demo`: they tell each token as it comes.

`python -m eloquent_netem.lab.demo_end KIND SIDE FOLDER`, as `eloquent_netem.lab.tun_ends`.
"""

import json
import time

from eloquent_netem.lab.tun_ends import End, main


class TellingEnd(End):
    """Says on standard output when each piece was generated, or is in the reader's hands."""

    def note(self, text: str) -> None:
        """See `End.note`."""
        super().note(text)
        print(json.dumps([time.monotonic(), text]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(TellingEnd)
