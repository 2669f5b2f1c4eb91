"""Choosing the next token."""

import torch

GREEDY_BELOW = 1e-5
"Temperatures below this are greedy: dividing by them would overflow."

_TOP_TOKENS = 512
"Top-p looks at this many tokens first; sorting a whole vocabulary takes milliseconds."


class Sampler:
    """Chooses the tokens of one turn, with a random generator of its own.

    The same seed and logits give the same tokens, whatever other turns do.
    """

    def __init__(self, *, temperature: float, top_p: float, seed: int) -> None:
        self.greedy = temperature < GREEDY_BELOW
        self._temperature = temperature
        self._top_p = top_p
        # torch takes 64 bits, callers may send any integer.
        self._generator = torch.Generator().manual_seed(seed & (2**64 - 1))

    def choose(self, logits: torch.Tensor) -> int:
        """Return a token id from the logits, [vocab]."""
        if self.greedy:
            return int(logits.argmax())
        # On CPU, so that a seed means the same on every device. Minus the greatest, so that a small
        # temperature cannot overflow.
        scores = logits.float().cpu()
        probabilities = torch.softmax((scores - scores.max()) / self._temperature, dim=-1)
        if self._top_p >= 1:
            return int(torch.multinomial(probabilities, 1, generator=self._generator))
        top, tokens = _nucleus(probabilities, self._top_p)
        return int(tokens[torch.multinomial(top, 1, generator=self._generator)])


def _nucleus(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fewest most probable tokens that reach `top_p` together: weights and ids.

    Nucleus sampling (Holtzman et al., 2020); the token that crosses the bound belongs to it.
    """
    count = min(_TOP_TOKENS, probabilities.shape[0])
    top, tokens = probabilities.topk(count)
    if float(top.sum()) < top_p:
        top, tokens = probabilities.sort(descending=True)
    before = top.cumsum(-1) - top
    keep = max(1, int((before < top_p).sum()))
    return top[:keep], tokens[:keep]
