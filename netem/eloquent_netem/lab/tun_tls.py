"""What the TCP baselines share: the kernel's sockets, TLS, and OpenAI's chunks."""

import datetime
import json
import socket
import ssl
import tempfile
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from eloquent.quic.certificate import ServerCertificate, make_certificate
from eloquent_netem.lab.tun_ends import MODEL, PORT, Hello
from eloquent_netem.namespaces import SERVER_ADDRESS

BACKLOG = 100
ANSWER_ID = "chatcmpl-5f2e8c0d9b6a4c7e8a1f3d2b4c6e8f01"
CREATED_S = 1_790_000_000

DONE = "[DONE]"
"Follows the last chunk."


def listening_socket(address: str, congestion: str, port: int = PORT) -> socket.socket:
    """Return a socket that listens; connections it accepts have its congestion control."""
    sock = socket.create_server((address, port), backlog=BACKLOG)
    for level, name, value in socket_options(congestion):
        sock.setsockopt(level, name, value)
    sock.setblocking(False)
    return sock


def socket_options(congestion: str) -> list[tuple[int, int, Any]]:
    """Return what both ends set on their sockets; all else is the kernel's default."""
    return [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode()),
    ]


def server_identity() -> tuple[ssl.SSLContext, Hello]:
    """Return a server's TLS settings with a new certificate, and what clients are to know."""
    certificate = make_certificate(SERVER_ADDRESS, datetime.datetime.now(datetime.UTC))
    pem = certificate.certificate.public_bytes(Encoding.PEM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with tempfile.TemporaryDirectory() as folder:  # `ssl` reads files only.
        path = Path(folder) / "certificate.pem"
        path.write_bytes(_key(certificate) + pem)
        context.load_cert_chain(path)
    return context, Hello(pem=pem.decode())


def client_context(server: Hello) -> ssl.SSLContext:
    """Return the TLS settings of a client that trusts this server alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=server.pem)
    return context


def chunk(text: str, *, is_last: bool = False) -> str:
    """Return a piece of text as OpenAI-compatible servers say it (vLLM's fields, in its order)."""
    choice = {
        "index": 0,
        "delta": {"content": text},
        "logprobs": None,
        "finish_reason": "stop" if is_last else None,
    }
    body = {
        "id": ANSWER_ID,
        "object": "chat.completion.chunk",
        "created": CREATED_S,
        "model": MODEL,
        "choices": [choice],
    }
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False)


def text_of(data: str) -> str:
    """Return the text in a chunk."""
    text: str = json.loads(data)["choices"][0]["delta"]["content"]
    return text


def _key(certificate: ServerCertificate) -> bytes:
    return certificate.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
