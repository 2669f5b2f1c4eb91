"""The strongest baseline of the literature: a bidirectional LSTM with aggregation of older events.

After the Network Traffic Transformer's comparison (HotNets 2022): the newest events one by one,
older ones in blocks. It reads the same events and queries as our model, has the same head, the same
loss and about as many parameters, and learns from the same families. Needs torch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eloquent.swiftqueue.dataset import Replay
from eloquent.swiftqueue.features import EVENT_FEATURES, QUERY_FEATURES
from eloquent.swiftqueue.model import POINT, Predictor, losses, quantiles, to_seconds
from eloquent.swiftqueue.shape import LEVELS, TIME_UNIT_S, Shape
from eloquent_netem.lab.swiftqueue_baselines import CHANGE_WEIGHT, Baseline
from eloquent_netem.lab.swiftqueue_knowledge import Knowledge
from eloquent_netem.lab.swiftqueue_measures import UPPER_LEVEL, Forecasts

NEWEST = 32
"Events that are read one by one."
BLOCKS = 16
BLOCK = 16
"Blocks of older events, and the events of a block."
SPAN = NEWEST + BLOCKS * BLOCK

TOLD = EVENT_FEATURES + 2
"Beside its features, how long before the newest an event's packet left, and that it exists."
EMBEDDING = 32
HIDDEN = 46
"Of each direction, in each of two layers: 99 thousand parameters in all."

BATCH = 256
RATE = 2e-3
MAX_GRADIENT = 1.0
EVALUATE_EVERY = 200
VALIDATION_QUESTIONS = 8192
PREDICT_BATCH = 1024

STEPS = 6000
"Some 20 minutes of one core: about what our model's training takes."


class AggregatedLstm(Baseline):
    """The LSTM; `steps` is its budget."""

    name = "lstm"

    def __init__(
        self,
        seed: int,
        *,
        steps: int = STEPS,
        batch: int = BATCH,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._seed = seed
        self._steps = steps
        self._batch = batch
        self._progress = progress
        self._weights: dict[str, NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_progress": None}

    def fit(self, train: Sequence[Knowledge], validation: Sequence[Knowledge]) -> None:
        """See `Baseline.fit`: the best weights on the validation families are kept."""
        rng = np.random.default_rng(self._seed)
        asked, judged = _Questions(train), _Questions(validation or train)
        shown = rng.permutation(judged.count)[:VALIDATION_QUESTIONS]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            net = _Net()
        optimizer = torch.optim.AdamW(net.parameters(), RATE, (0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, RATE, total_steps=self._steps, pct_start=0.05, cycle_momentum=False
        )
        least = float("inf")
        for step in range(1, self._steps + 1):
            loss = asked.loss(net, rng.integers(0, asked.count, self._batch))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(net.parameters(), MAX_GRADIENT)
            optimizer.step()
            schedule.step()
            if step % EVALUATE_EVERY and step < self._steps:
                continue
            with torch.no_grad():
                found = float(
                    np.mean(
                        [
                            float(judged.loss(net, chosen))
                            for chosen in np.array_split(shown, -(-len(shown) // PREDICT_BATCH))
                        ]
                    )
                )
            self._progress(f"lstm: step {step} of {self._steps}, validation loss {found:.4f}")
            if found < least:
                least = found
                self._weights = {name: one.numpy().copy() for name, one in net.state_dict().items()}

    @torch.no_grad()
    def predict(self, known: Knowledge) -> Forecasts:
        """See `Baseline.predict`."""
        net = _Net()
        net.load_state_dict({name: torch.from_numpy(one) for name, one in self._weights.items()})
        replay = known.replayed
        tape = _Tape([replay])
        point_s, upper_s = (np.full((len(known.now_s), 2), np.nan) for _ in range(2))
        # All packets with the same newest event share what the events came to.
        newest, place = np.unique(replay.newest.astype(np.int64), return_inverse=True)
        heard = newest >= 0
        summaries = torch.zeros(len(newest), 2 * HIDDEN)
        for chosen in _cut(np.flatnonzero(heard), PREDICT_BATCH):
            summaries[chosen] = net(*tape.windows(tape.begins[0] + newest[chosen]))
        for rows in _cut(np.flatnonzero(replay.newest >= 0), PREDICT_BATCH):
            outputs = net.head(summaries[place[rows]], torch.from_numpy(replay.queries[rows]))
            base_s = replay.base_s[rows, np.newaxis]
            point_s[rows] = base_s + to_seconds(outputs[..., POINT]).numpy()
            upper = to_seconds(quantiles(outputs)[..., LEVELS.index(UPPER_LEVEL)])
            upper_s[rows] = base_s + upper.numpy()
        return Forecasts(point_s, upper_s)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(TOLD, EMBEDDING)
        self.aggregate = nn.Linear(2 * TOLD, EMBEDDING)
        self.lstm = nn.LSTM(EMBEDDING, HIDDEN, 2, batch_first=True, bidirectional=True)
        shape = Shape(
            event_features=1,
            query_features=QUERY_FEATURES,
            width=2 * HIDDEN,
            layers=0,
            hidden=96,
            middle=32,
        )
        self.head = Predictor(shape).head

    def forward(self, newest: Tensor, older: Tensor) -> Tensor:
        """Return what events came to, (B, 2 HIDDEN).

        Args:
            newest: (B, NEWEST, TOLD), the newest last.
            older: (B, BLOCKS, BLOCK, TOLD), the oldest first.
        """
        blocks = self.aggregate(torch.cat((older.mean(2), older.amax(2)), -1))
        x = torch.relu(torch.cat((blocks, self.embed(newest)), 1))
        _, (h, _) = self.lstm(x)
        return torch.cat((h[-2], h[-1]), -1)


class _Tape:
    """The events of replays one after another, with room before each for those that are not."""

    def __init__(self, replays: Sequence[Replay]) -> None:
        lengths = [SPAN + len(one.events) for one in replays]
        ends = np.cumsum(lengths)
        self.begins = [int(end - len(one.events)) for end, one in zip(ends, replays, strict=True)]
        "Where each replay's first event is."
        self._told = np.zeros((int(ends[-1]), EVENT_FEATURES + 1), np.float32)
        self._sent_s = np.zeros(int(ends[-1]))
        for begin, one in zip(self.begins, replays, strict=True):
            rows = slice(begin, begin + len(one.events))
            self._told[rows, :-1] = one.events
            self._told[rows, -1] = 1.0
            self._sent_s[rows] = one.event_sent_s

    def windows(self, places: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return what `_Net.forward` takes, for the newest events at these places."""
        rows = places[:, np.newaxis] + np.arange(1 - SPAN, 1)
        told = self._told[rows]
        gap_s = np.abs(self._sent_s[places][:, np.newaxis] - self._sent_s[rows])
        ages = np.log1p(gap_s / TIME_UNIT_S) * told[..., -1]
        window = torch.from_numpy(
            np.concatenate((told, ages[..., np.newaxis].astype(np.float32)), axis=-1)
        )
        older = window[:, :-NEWEST].reshape(-1, BLOCKS, BLOCK, TOLD)
        return window[:, -NEWEST:], older


class _Questions:
    """What is asked about flows: every packet before which something was heard."""

    def __init__(self, flows: Sequence[Knowledge]) -> None:
        replays = [one.replayed for one in flows]
        self._tape = _Tape(replays)
        asked = [one.newest >= 0 for one in replays]
        pairs = list(zip(replays, asked, strict=True))
        self._places = np.concatenate(
            [
                begin + one.newest[kept]
                for begin, (one, kept) in zip(self._tape.begins, pairs, strict=True)
            ]
        )
        self._queries = np.concatenate([one.queries[kept] for one, kept in pairs])
        self._delay_s = np.concatenate([one.delay_s[kept] for one, kept in pairs])
        self._lost = np.concatenate([one.lost[kept] for one, kept in pairs])
        self._changed = np.concatenate([one.changed[kept] for one, kept in pairs])
        self.count = len(self._places)

    def loss(self, net: _Net, chosen: NDArray[np.int64]) -> Tensor:
        """Return our model's loss for some of the questions."""
        summaries = net(*self._tape.windows(self._places[chosen]))
        return losses(
            net.head(summaries, torch.from_numpy(self._queries[chosen])),
            torch.from_numpy(self._delay_s[chosen]),
            torch.from_numpy(self._lost[chosen]),
            torch.from_numpy(self._changed[chosen]),
            CHANGE_WEIGHT,
        ).total


def _cut(rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
