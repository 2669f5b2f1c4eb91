"""How soon a dead link is noticed, and how a live one is told from it while the model is quiet.

Whoever has a turn open and hears nothing asks the other side, which answers at once whatever its
model does. With 20 % of the packets lost each way a question and its answer get through with
probability 0.64; at 300 ms of round trip ten or more of them fit between `PROBE_AFTER_S` and
`DEAD_AFTER_S`, so that a live link is taken for dead about once in ten hours at most.
"""

PROBE_AFTER_S = 0.5
PROBE_EVERY_S = 0.1
"""While a turn is open and nothing has come for `PROBE_AFTER_S`, the client asks the server every
`PROBE_EVERY_S`: each packet that comes shows that the link lives."""

SERVER_PROBE_AFTER_S = 1.0
SERVER_PROBE_EVERY_S = 0.2
"The server hears the client's probes, so it asks later, and not so often."

DEAD_AFTER_S = 1.8
"A link that says nothing for so long, and was asked, is dead."

KEEPALIVE_S = 20.0
"""Without an open turn a client that hears nothing sends a PING this often: within the 30 s for
which common NATs keep an idle mapping of UDP."""

TRY_S = 0.5
TRY_RTTS = 2.0
"""After a change of network or a sleep a link has to say something within `TRY_S` and `TRY_RTTS`
round trips, or another one is made beside it."""
