"""How much memory and disk keys and values may take. Needs no torch: the server reads it, too."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class KvOptions:
    """The bounds of running turns, prefix cache and second tier."""

    memory_bytes: int | None = None
    "Running turns and prefix cache together; None: a quarter of the machine's memory."
    tenant_bytes: int | None = None
    "One tenant's part of the prefix cache; None: as much as there is."
    ram_bytes: int = 0
    "What the prefix cache has no room for is kept in so much memory more."
    directory: str | None = None
    "Prompts stay warm here over restarts; None: on no disk."
    disk_bytes: int = 0
    "What the directory may hold."
    encoding: Literal["raw", "int8"] = "raw"
    "In the second tier: exact, or in 8 bits, a quarter of the size and nearly exact."
