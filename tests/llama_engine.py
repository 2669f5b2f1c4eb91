"""llama.cpp's OpenAI server in a process of its own: `python llama_engine.py FILE.gguf`.

It prints its URL and ends when its standard input does.
"""

import sys

MODEL = "smol"
CONTEXT_TOKENS = 2048
"Of each of two turns."


def main() -> None:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = sys.argv[1]
    parameters.model_alias = [MODEL]
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
    parameters.n_parallel, parameters.n_ctx = 2, 2 * CONTEXT_TOKENS
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.endpoint_slots = parameters.endpoint_metrics = True
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)  # noqa: T201
    sys.stdin.read()


if __name__ == "__main__":
    main()
