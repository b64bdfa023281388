"""What proposes networks: a recurrent controller that learns by policy gradient, aging evolution, random search."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .space import Choices, SearchSpace


class Controller(nn.Module):
    """A policy over the choices of a space: an LSTM that takes the decisions one after another, each knowing those
    before.

    It is trained by REINFORCE (Williams, 1992) with a moving average of the rewards as baseline, and a small bonus on
    the policy's entropy against settling too early. MnasNet (arXiv:1807.11626, section 3) uses PPO, which takes several
    steps on each batch of results; with a few dozens of trials one step each is as good as there is to learn from.

    Args:
        counts: how many options each decision has.
        seed: of weights and samples.
        hidden: of the LSTM.
        rate: Adam's.
        entropy: the weight of the bonus.
    """

    def __init__(
        self, counts: Sequence[int], seed: int = 0, hidden: int = 32, rate: float = 0.02, entropy: float = 1e-3
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.start = nn.Parameter(torch.zeros(hidden))
            self.cell = nn.LSTMCell(hidden, hidden)
            self.options = nn.ModuleList(nn.Embedding(count, hidden) for count in counts)
            self.heads = nn.ModuleList(nn.Linear(hidden, count) for count in counts)
        for head in self.heads:  # all options are alike likely at first
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.generator = torch.Generator().manual_seed(seed)
        self.entropy, self.baseline = entropy, None
        self.optimizer = torch.optim.Adam(self.parameters(), rate)

    def forward(self, choices: Tensor) -> Tensor:
        """(N, decisions) choices → (2, N): the logarithm of each one's probability, and the entropy on its way."""
        return self._walk(len(choices), choices)[1]

    def _walk(self, count: int, choices: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.start.expand(count, -1)
        state, taken, sums = None, [], torch.zeros(2, count)
        for i, (head, options) in enumerate(zip(self.heads, self.options, strict=True)):
            state = self.cell(x, state)
            logs = head(state[0]).log_softmax(1)
            if choices is None:
                choice = torch.multinomial(logs.exp(), 1, generator=self.generator)[:, 0]
            else:
                choice = choices[:, i]
            taken.append(choice)
            sums = sums + torch.stack([logs.gather(1, choice[:, None])[:, 0], -(logs.exp() * logs).sum(1)])
            x = options(choice)
        return torch.stack(taken, 1), sums

    @torch.no_grad()
    def sample(self, count: int) -> list[Choices]:
        """Draws so many choices."""
        return [tuple(row) for row in self._walk(count, None)[0].tolist()]

    @torch.no_grad()
    def probability(self, choices: Choices) -> float:
        """Of drawing these."""
        return self(torch.tensor([choices]))[0].exp().item()

    def learn(self, choices: Sequence[Choices], rewards: Sequence[float]) -> None:
        """One step of policy gradient on these results."""
        values = torch.tensor(rewards)
        mean = values.mean().item()
        baseline = mean if self.baseline is None else self.baseline
        self.baseline = 0.8 * baseline + 0.2 * mean
        logs, entropies = self(torch.tensor(list(choices)))
        loss = -((values - baseline) * logs).mean() - self.entropy * entropies.mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()


class ControllerSearch:
    """Proposes what a `Controller` draws."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.controller = Controller([len(options) for _, options in space.decisions], seed)

    def propose(self, count: int) -> list[Choices]:
        return self.controller.sample(count)

    def learn(self, choices: Sequence[Choices], rewards: Sequence[float]) -> None:
        self.controller.learn(choices, rewards)


class AgingEvolution:
    """Regularized evolution (Real et al., 2019, arXiv:1802.01548, algorithm 1): of some members of the population drawn
    at random the best has a child with one decision changed; the oldest member dies for it."""

    def __init__(self, space: SearchSpace, seed: int, population: int = 16, drawn: int = 5) -> None:
        self.space, self.generator, self.drawn = space, random.Random(seed), drawn
        self.members: deque[tuple[float, Choices]] = deque(maxlen=population)

    def propose(self, count: int) -> list[Choices]:
        return [self._propose() for _ in range(count)]

    def _propose(self) -> Choices:
        if len(self.members) < self.members.maxlen:
            return self.space.sample(self.generator)
        rivals = self.generator.sample(list(self.members), min(self.drawn, len(self.members)))
        return self.space.mutate(max(rivals)[1], self.generator)

    def learn(self, choices: Sequence[Choices], rewards: Sequence[float]) -> None:
        self.members.extend(zip(rewards, choices, strict=True))


class RandomSearch:
    """Proposes each option alike likely, and learns nothing."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.space, self.generator = space, random.Random(seed)

    def propose(self, count: int) -> list[Choices]:
        return [self.space.sample(self.generator) for _ in range(count)]

    def learn(self, choices: Sequence[Choices], rewards: Sequence[float]) -> None:
        pass


METHODS = {"controller": ControllerSearch, "evolution": AgingEvolution, "random": RandomSearch}
