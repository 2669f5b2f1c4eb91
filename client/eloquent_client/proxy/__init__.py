"""OpenAI's API on this machine, carried over Eloquent to a server.

`handler` answers requests, whoever brings them: `app` and `serve` over HTTP for `eloquent proxy`,
and `eloquent_client.httpx_transport` within a program.
"""
