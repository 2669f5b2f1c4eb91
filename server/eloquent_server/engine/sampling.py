"""Choosing the next token.

A token depends on the request, the logits and the tokens before it, and on nothing that the
sampler remembers: its random number comes from the seed and its place in the answer. So an answer
that is continued after a restart, or checked several tokens at a time, is the same answer.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from eloquent.core.events import ChosenLogprob, TokenLogprob
from eloquent_server.engine.grammar import Grammar, TokenTable
from eloquent_server.engine.options import SamplingOptions

_TOP_TOKENS = 512
"Top-p looks at this many tokens first; sorting a whole vocabulary takes milliseconds."
_UNIFORM_BYTES = 6
"A uniform number of 48 bits is exact in float64 and stays below 1 when it is scaled."


class Sampler:
    """Chooses the tokens of one turn."""

    def __init__(
        self, options: SamplingOptions, *, prompt_tokens: int, table: TokenTable | None = None
    ) -> None:
        """Take the options, the prompt's length and, for logprobs and grammars, the tokens' texts.

        Raises:
            RequestError: `invalid_request`, the JSON schema is wrong, or more than is supported.
        """
        needs_table = options.logprobs is not None or options.json_schema is not None
        if needs_table and table is None:
            raise ValueError("logprobs and grammars need the texts of tokens")
        self.grammar: Grammar | None = None
        "Its state is that of the tokens that it was given; `choose` only reads it."
        if table is not None and needs_table:
            table.prepare()
            if options.json_schema is not None:
                self.grammar = table.grammar(options.json_schema)
        self.greedy = options.is_greedy and not options.is_shaped
        "Whether `choose` is no more than the greatest logit."
        self._table = table
        self._options = options
        self._prompt_tokens = prompt_tokens

    def choose(self, logits: torch.Tensor, tokens: Sequence[int]) -> int:
        """Return the id of the token that follows `tokens` (prompt and answer).

        `logits` are [vocab], and stay as they are.
        """
        if self.greedy:
            return int(logits.argmax())
        # On CPU, so that a seed means the same on every device.
        scores = self._shape(logits.float().cpu(), tokens)
        if self._options.is_greedy:
            return int(scores.argmax())
        # Minus the greatest, so that a small temperature cannot overflow.
        scores = (scores - scores.max()) / self._options.temperature
        weights, ids = self._candidates(torch.softmax(scores, dim=-1))
        at = draw(weights, uniform(self._options.seed, len(tokens) - self._prompt_tokens))
        return at if ids is None else int(ids[at])

    def logprob(self, logits: torch.Tensor, token: int) -> ChosenLogprob | None:
        """Return how likely the model itself held `token` and its rivals; None: nobody asked."""
        if self._options.logprobs is None or self._table is None:
            return None
        return token_logprob(logits, token, top=self._options.logprobs, text=self._table.text)

    def _shape(self, logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        """Return the logits after penalties, bias and grammar."""
        options = self._options
        if not options.is_shaped:
            return logits
        logits = logits.clone()
        if options.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(tokens)))
            at = logits[seen]
            factor = options.repetition_penalty
            logits[seen] = torch.where(at > 0, at / factor, at * factor)
        if options.presence_penalty or options.frequency_penalty:
            said = Counter(tokens[self._prompt_tokens :])
            counts = torch.tensor(list(said.values()), dtype=logits.dtype)
            penalties = options.presence_penalty + options.frequency_penalty * counts
            logits[torch.tensor(list(said), dtype=torch.long)] -= penalties
        for token, bias in options.logit_bias:
            logits[token] += bias
        if self.grammar is not None:
            self.grammar.mask(logits)
        return logits

    def _candidates(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weights to draw from and whose they are; None: of all tokens, in order."""
        options = self._options
        if options.min_p:
            weights = weights.masked_fill(weights < options.min_p * weights.max(), 0.0)
            weights = weights / weights.sum()
        ids: torch.Tensor | None = None
        if options.top_k:
            weights, ids = weights.topk(min(options.top_k, weights.shape[0]))
            weights = weights / weights.sum()
        if options.top_p < 1:
            weights, best = _nucleus(weights, options.top_p)
            ids = best if ids is None else ids[best]
        return weights, ids


def uniform(seed: int, index: int) -> float:
    """Return a number in [0, 1) for the token at `index` of an answer."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=_UNIFORM_BYTES).digest()
    return int.from_bytes(digest, "big") / 2.0 ** (8 * _UNIFORM_BYTES)


def token_logprob(
    logits: torch.Tensor, token: int, *, top: int, text: Callable[[int], bytes]
) -> ChosenLogprob:
    """Return how likely `token` was by the model's own `logits` [vocab], and its `top` rivals."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = logprobs.topk(min(top, logprobs.shape[0]))
    best = zip(ids.tolist(), values.tolist(), strict=True)
    return ChosenLogprob(
        text(token),
        float(logprobs[token]),
        tuple(TokenLogprob(text(other), value) for other, value in best),
    )


def draw(weights: torch.Tensor, at: float) -> int:
    """Return the index at which the running sum of `weights` passes the fraction `at` of it all."""
    sums = weights.double().cumsum(-1)
    return int(torch.searchsorted(sums, at * sums[-1], right=True))


def _nucleus(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fewest most probable tokens that reach `top_p` together: weights and ids.

    The token that crosses the bound belongs to them.
    """
    count = min(_TOP_TOKENS, probabilities.shape[0])
    top, tokens = probabilities.topk(count)
    if float(top.sum()) < top_p:
        top, tokens = probabilities.sort(descending=True)
    before = top.cumsum(-1) - top
    keep = max(1, int((before < top_p).sum()))
    return top[:keep], tokens[:keep]
