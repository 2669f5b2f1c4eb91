"""QUIC handshakes that are begun and never finished, handed to a listener in virtual time."""

from session_world import CERTIFICATE, SERVER, now

from eloquent.quic.client import ClientConnection, client_configuration
from eloquent.quic.ecn import Ecn
from eloquent.quic.listen import Listener


class HalfOpen:
    """A client that begins a handshake and never finishes it."""

    def __init__(self, listener: Listener, number: int) -> None:
        configuration = client_configuration(SERVER, pin=CERTIFICATE.pin)
        self._connection = ClientConnection(configuration, pin=CERTIFICATE.pin)
        self._listener = listener
        self.address = (f"198.51.100.{number % 250}", 10_000 + number)
        self._connection.connect((SERVER, 1), now())
        self._send()

    def answer(self, retry: bytes) -> None:
        """Take a Retry, and begin anew with its token."""
        self._connection.receive(retry, (SERVER, 1), now())
        self._send()

    def _send(self) -> None:
        for data, _, _ in self._connection.send(now()):
            self._listener.datagram_received(data, self.address, Ecn.NOT_ECT)


def sent_by(listener: Listener) -> list[tuple[bytes, object]]:
    """Return what the listener sends from now on, which reaches nobody."""
    sent: list[tuple[bytes, object]] = []
    usual = listener.send

    def send(data: bytes, address: object, ecn: Ecn = Ecn.NOT_ECT) -> None:
        if str(address).startswith("('198.51.100."):
            sent.append((data, address))
        else:
            usual(data, address, ecn)

    listener.send = send  # type: ignore[method-assign]
    return sent
