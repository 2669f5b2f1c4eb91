"""What a request says of how its answer is made. Needs no torch: the server reads it, too."""

from dataclasses import dataclass
from typing import Any

from eloquent_server.chat import ChatRequest

GREEDY_BELOW = 1e-5
"Temperatures below this are greedy: dividing by them would overflow."


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How an answer's tokens are chosen, and what of it is reported."""

    seed: int
    "Any integer; fresh entropy if the user gave none."
    temperature: float = 1.0
    "0 is greedy decoding."
    top_p: float = 1.0
    "Only the likeliest tokens that reach this probability together (Holtzman et al., 2020)."
    top_k: int = 0
    "Only so many of the likeliest tokens; 0: all."
    min_p: float = 0.0
    "Only tokens at least so likely, as a fraction of the likeliest one's (Nguyen et al., 2024)."
    presence_penalty: float = 0.0
    "Taken from the logit of each token that the answer has."
    frequency_penalty: float = 0.0
    "Taken from a token's logit for each time that the answer has it."
    repetition_penalty: float = 1.0
    "Divides the logits of tokens in prompt or answer, or multiplies negative ones (CTRL, 2019)."
    logit_bias: tuple[tuple[int, float], ...] = ()
    "Token ids and what is added to their logits."
    stop: tuple[str, ...] = ()
    "The answer ends before the first of these."
    logprobs: int | None = None
    "Report how likely each token was, and so many alternatives; None: do not."
    json_schema: str | None = None
    "The answer is a JSON text that this schema, itself JSON, allows."

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, after penalties and bias."""
        return self.temperature < GREEDY_BELOW

    @property
    def is_shaped(self) -> bool:
        """Whether logits are changed before anything else happens to them."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
            or self.logit_bias
            or self.json_schema is not None
        )


def sampling_fields(
    request: ChatRequest, *, temperature: float, top_p: float, seed: int
) -> dict[str, Any]:
    """Return a request's `SamplingOptions`; the arguments stand in for what it leaves open."""
    return {
        "seed": seed if request.seed is None else request.seed,
        "temperature": temperature if request.temperature is None else request.temperature,
        "top_p": top_p if request.top_p is None else request.top_p,
        "top_k": max(0, request.top_k),
        "min_p": request.min_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "logit_bias": request.bias,
        "stop": request.stop_strings,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        "json_schema": request.schema,
    }
