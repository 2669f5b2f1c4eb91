"""The predictor in torch: a causal Transformer over a connection's observations.

The model reads *events* (`History.on_observation`) and is asked by *queries* (`History.query`).
It knows no positions, only distances, so the last W events are all it needs: a ring of W keys
and values for each layer, fed event by event, computes the same as the pass over a whole
sequence that is written here (`eloquent.swiftqueue.inference` is that, in numpy).

Sizes are those of `Shape`: E event features, Q query features, D = width, H = heads, d = D / H,
F = feed, W = window. Weights are stored as torch has them, (outputs, inputs); `x @ w.T + b`.

Event i, sent at t[i] (seconds; differences count), in the order in which they became known:

    x = event @ embed.weight.T + embed.bias                                        (D,)
    for each layer n, under the prefix `layers.{n}.`:
        y = rms(x) * attention_norm.weight
        q, k, v = split(y @ qkv.weight.T, 3), each (D,) = (H, d), heads outermost
        for j = i - W + 1 .. i (itself included; those that exist), in each head h:
            score[j] = q . k[j] / sqrt(d)
                     + distance_bias[h, i - j]                                     (H, W)
                     + time_slope[h] * log1p(abs(t[i] - t[j]) / TIME_UNIT_S)       (H,)
        a = sum of softmax(score)[j] * v[j], heads side by side                    (D,)
        x = x + a @ out.weight.T
        y = rms(x) * feed_norm.weight
        x = x + relu(y @ up.weight.T + up.bias) @ down.weight.T + down.bias        (F,) inside
    h = rms(x) * norm.weight
    rms(x) = x / sqrt(mean(x * x) + RMS_EPSILON)

Keys and values of a layer are thus those that event j had when it was computed, with all that it
had seen before: the same as in a ring of the last W. They are in the ring before i attends.

The head, for a query u about the newest event's h:

    y = relu([h, u] @ head.hidden.weight.T + head.hidden.bias)
    y = relu(y @ head.middle.weight.T + head.middle.bias)
    z = y @ head.out.weight.T + head.out.bias + u @ head.skip.weight.T             (2 * 5,)
    z = z.reshape(2, 5): for each `Queue` (L, C)
        z[0]                                   median, scaled
        z[0] + softplus(z[1])                  0.9 quantile, scaled
        z[0] + softplus(z[1]) + softplus(z[2]) 0.99 quantile, scaled
        z[3]                                   point, scaled
        z[4]                                   logit of the probability of a drop
    seconds = DELAY_UNIT_S * expm1(clip(scaled, 0, MAX_SCALED)); probability = sigmoid(logit)

Files: `weights/swiftqueue.safetensors` holds these tensors in float32 under these names (layer 0:
`layers.0.qkv.weight`); `weights/swiftqueue.json` beside it holds {"shape": Shape.as_dict(),
"levels": LEVELS, ...}. RMS_EPSILON, TIME_UNIT_S and the delay's scale are constants of
`eloquent.swiftqueue.shape`.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from eloquent.swiftqueue.features import QUERY_NAMES
from eloquent.swiftqueue.records import Queue
from eloquent.swiftqueue.shape import (
    DELAY_UNIT_S,
    LEVELS,
    MAX_DELAY_S,
    MAX_SCALED,
    QUEUE_OUTPUTS,
    RMS_EPSILON,
    TIME_UNIT_S,
    Shape,
)

POINT = len(LEVELS)
DROP = POINT + 1
"Where the head has them, among a queue's outputs."
ERROR_UNIT_S = 0.1
"In the loss, an error of so many seconds counts like one of 1 in the delay's scale."
DROP_WEIGHT = 0.2
"Of the drops' cross entropy, in the loss."
OUTSIDE = -1
"The segment of places before a sequence's beginning."


class Predictor(nn.Module):
    """The whole model; the module's docstring has the formulas."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Linear(shape.event_features, shape.width)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = _Norm(shape.width)
        self.head = _Head(shape)

    def forward(self, events: Tensor, sent_s: Tensor, segments: Tensor) -> Tensor:
        """Return h of each event: (B, T, width).

        Args:
            events: (B, T, event_features).
            sent_s: (B, T); differences count, so any beginning within a sequence will do.
            segments: (B, T), integers; an event attends to those of its own segment only.
        """
        length = events.shape[1]
        padding = -length % self.shape.window
        x = self.embed(functional.pad(events, (0, 0, 0, padding)))
        sent_s = functional.pad(sent_s, (0, padding))
        segments = functional.pad(segments, (0, padding), value=OUTSIDE)
        window = self.shape.window
        gap_s = (
            _blocks(sent_s, window).unsqueeze(-1) - _with_before(sent_s, window).unsqueeze(-2)
        ).abs()
        log_gap = torch.log1p(gap_s / TIME_UNIT_S)
        same = _blocks(segments, window).unsqueeze(-1) == _with_before(
            segments, window, fill=OUTSIDE - 1
        ).unsqueeze(-2)
        distance = _distances(window, events.device)
        seen = same & (distance >= 0) & (distance < window)
        for layer in self.layers:
            x = layer(x, log_gap, seen, distance.clamp(0, window - 1))
        return self.norm(x)[:, :length]  # type: ignore[no-any-return]

    def ask(self, h: Tensor, queries: Tensor) -> Tensor:
        """Return the head's outputs, (N, 2, QUEUE_OUTPUTS), quantiles not yet summed.

        Args:
            h: (N, width), of the newest event.
            queries: (N, query_features).
        """
        return self.head(h, queries)  # type: ignore[no-any-return]


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPSILON) * self.weight


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads, self.window = shape.width, shape.heads, shape.window
        self.attention_norm = _Norm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.distance_bias = nn.Parameter(torch.zeros(shape.heads, shape.window))
        # From a head that looks at all times alike to one that looks at the newest.
        self.time_slope = nn.Parameter(-torch.linspace(0.0, 1.0, shape.heads))
        self.out = nn.Linear(width, width, bias=False)
        self.feed_norm = _Norm(width)
        self.up = nn.Linear(width, shape.feed)
        self.down = nn.Linear(shape.feed, width)

    def forward(self, x: Tensor, log_gap: Tensor, seen: Tensor, distance: Tensor) -> Tensor:
        x = x + self._attend(self.attention_norm(x), log_gap, seen, distance)
        y = functional.relu(self.up(self.feed_norm(x)))
        return x + self.down(y)  # type: ignore[no-any-return]

    def _attend(self, y: Tensor, log_gap: Tensor, seen: Tensor, distance: Tensor) -> Tensor:
        """Attend in blocks of W events, each to itself and the block before: (B, T, width).

        In the blocks N = T / W, an event has a place q of W and what it sees a place k of 2 W.
        """
        batch, length, width = y.shape
        q, k, v = self.qkv(y).split(width, -1)
        # (B, N, H, W or 2 W, d)
        q = _blocks(self._heads(q), self.window).transpose(2, 3)
        k = _with_before(self._heads(k), self.window).transpose(2, 3)
        v = _with_before(self._heads(v), self.window).transpose(2, 3)
        bias = torch.addcmul(
            self.distance_bias[:, distance], self.time_slope[:, None, None], log_gap.unsqueeze(2)
        ).masked_fill(~seen.unsqueeze(2), -torch.inf)
        q = q * (width // self.heads) ** -0.5
        scores = torch.baddbmm(
            bias.flatten(0, 2), q.flatten(0, 2), k.flatten(0, 2).transpose(1, 2)
        ).softmax(-1)
        heard = (scores @ v.flatten(0, 2)).reshape(q.shape).transpose(2, 3)
        return self.out(heard.reshape(batch, length, width))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class _Head(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        outputs = len(Queue) * QUEUE_OUTPUTS
        self.hidden = nn.Linear(shape.width + shape.query_features, shape.hidden)
        self.middle = nn.Linear(shape.hidden, shape.middle)
        self.out = nn.Linear(shape.middle, outputs)
        self.skip = nn.Linear(shape.query_features, outputs, bias=False)
        _begin_as_last_value(self)

    def forward(self, h: Tensor, queries: Tensor) -> Tensor:
        y = functional.relu(self.hidden(torch.cat((h, queries), -1)))
        y = functional.relu(self.middle(y))
        z = self.out(y) + self.skip(queries)
        return z.reshape(*z.shape[:-1], len(Queue), QUEUE_OUTPUTS)  # type: ignore[no-any-return]


@torch.no_grad()
def _begin_as_last_value(head: _Head) -> None:
    """Let an untrained head foretell the last known delay of each queue, and few drops."""
    head.out.weight.mul_(0.1)
    head.skip.weight.zero_()
    bias = head.out.bias.zero_().view(len(Queue), QUEUE_OUTPUTS)
    bias[:, 1:POINT] = -1.0
    bias[:, DROP] = -4.0
    skip = head.skip.weight.view(len(Queue), QUEUE_OUTPUTS, -1)
    for queue in Queue:
        last = QUERY_NAMES.index(f"{queue.name.lower()}_delay")
        skip[queue, 0, last] = skip[queue, POINT, last] = 1.0


def quantiles(outputs: Tensor) -> Tensor:
    """Return the quantiles at LEVELS in the delay's scale: (..., 2, 3), none below the last."""
    steps = functional.softplus(outputs[..., 1:POINT])
    return torch.cat((outputs[..., :1], steps), -1).cumsum(-1)


def to_seconds(scaled: Tensor) -> Tensor:
    """Return delays in seconds from the scale in which they are foretold, cut to what is sane."""
    return DELAY_UNIT_S * torch.expm1(scaled.clamp(0.0, MAX_SCALED))


class Losses(NamedTuple):
    """What a step makes smaller, all scalars."""

    total: Tensor
    quantiles: Tensor
    point: Tensor
    drop: Tensor


def losses(
    outputs: Tensor, delay_s: Tensor, lost: Tensor, changed: Tensor, change_weight: float
) -> Losses:
    """Return the losses of the head's outputs.

    Quantiles have the pinball loss, changes weighing like all else, so that they stay calibrated;
    both they and the point are judged in the delay's scale and in seconds.

    Args:
        outputs: (N, 2, QUEUE_OUTPUTS).
        delay_s: (N, 2), queueing delays; NaN: not known.
        lost: (N, 2), 0 or 1; negative: not known.
        changed: (N, 2).
        change_weight: what a change counts, in the point's loss.
    """
    known = ~delay_s.isnan()
    true_s = delay_s.nan_to_num(0.0).clamp(0.0, MAX_DELAY_S)
    scaled = torch.log1p(true_s / DELAY_UNIT_S)
    foretold = quantiles(outputs)
    pinball = _pinball(scaled[..., None] - foretold)
    pinball = pinball + _pinball(true_s[..., None] - to_seconds(foretold)) / ERROR_UNIT_S
    of_quantiles = _mean(pinball.mean(-1), known)
    point = outputs[..., POINT]
    error = (scaled - point).abs() + (true_s - to_seconds(point)).abs() / ERROR_UNIT_S
    of_point = _mean(error, known * (1.0 + (change_weight - 1.0) * changed))
    entropy = functional.binary_cross_entropy_with_logits(
        outputs[..., DROP], lost.clamp(min=0).float(), reduction="none"
    )
    of_drop = _mean(entropy, lost >= 0)
    return Losses(of_quantiles + of_point + DROP_WEIGHT * of_drop, of_quantiles, of_point, of_drop)


def _pinball(error: Tensor) -> Tensor:
    """Return the pinball losses at LEVELS of errors (..., 3), true less foretold."""
    levels = torch.tensor(LEVELS, device=error.device)
    return torch.maximum(levels * error, (levels - 1) * error)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1)


def save_weights(model: Predictor, path: Path) -> None:
    """Write the model's tensors to a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {name: one.contiguous().cpu() for name, one in model.state_dict().items()}
    path.write_bytes(save(tensors))


def _blocks(x: Tensor, window: int) -> Tensor:
    """Cut (B, T, ...) into blocks: (B, T / W, W, ...)."""
    return x.reshape(len(x), -1, window, *x.shape[2:])


def _with_before(x: Tensor, window: int, fill: int = 0) -> Tensor:
    """Cut into blocks, each with the block before it: (B, T / W, 2 W, ...)."""
    blocks = _blocks(x, window)
    before = torch.cat((torch.full_like(blocks[:, :1], fill), blocks[:, :-1]), 1)
    return torch.cat((before, blocks), 2)


def _distances(window: int, device: torch.device) -> Tensor:
    """Return how many events place k of 2 W is before place q of W: (W, 2 W)."""
    places = torch.arange(window, device=device)
    return places[:, None] + window - torch.arange(2 * window, device=device)
