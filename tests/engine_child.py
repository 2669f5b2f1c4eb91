"""An engine process with a tiny model, and with faults that a test asks for: the model's name.

tiny            the tiny model
greedy          its authors advise temperature 0
slow            it takes 20 ms for each step
poisoned        it kills its process when it reads POISON
dies            it never gets loaded: the process kills itself
hangs           it never gets loaded: the process waits
late:FILE       it hangs the first time, when FILE is not there
broken:FILE     its tenth forward says so the first time that the device is lost
stuck:FILE      its tenth forward never returns the first time, when FILE is not there
"""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eloquent_server.engine import ipc, process
from eloquent_server.models import Progress

if TYPE_CHECKING:
    from eloquent_server.engine.loader import LoadedModel

COMMAND = (sys.executable, __file__)
POISON = "ZZZZ"
STEP_S = 0.02
FAULT_AT = 10


class Faulty:
    """A model that does something before each forward."""

    def __init__(self, loaded: "LoadedModel", name: str) -> None:
        self._model = loaded.model
        self._poison = loaded.tokenizer(POISON)["input_ids"]
        self._name, _, self._path = name.partition(":")
        self._forwards = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, input_ids: Any, **options: Any) -> Any:
        if self._name == "poisoned":
            ids, count = input_ids[0].tolist(), len(self._poison)
            if any(ids[i : i + count] == self._poison for i in range(len(ids))):
                os.kill(os.getpid(), signal.SIGKILL)
        self._forwards += 1
        if self._path and self._forwards == FAULT_AT and not Path(self._path).exists():
            Path(self._path).touch()
            if self._name == "broken":
                import torch  # Here, since the server's side imports this file, too.

                raise torch.AcceleratorError("CUDA error: an illegal memory access")
            time.sleep(3600)
        time.sleep(STEP_S)
        return self._model(input_ids=input_ids, **options)


def load(options: ipc.Load, progress: Progress) -> "LoadedModel":
    progress("Loading", None)
    name, _, path = options.model.partition(":")
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hangs" or (name == "late" and not Path(path).exists()):
        if path:
            Path(path).touch()
        time.sleep(3600)
    from tiny_model import tiny_loaded

    loaded = tiny_loaded()
    if name == "greedy":
        return dataclasses.replace(loaded, temperature=0.0)
    if name in ("slow", "poisoned", "stuck", "broken"):
        return dataclasses.replace(loaded, model=Faulty(loaded, options.model))
    return loaded


if __name__ == "__main__":
    process.main(load)
