"""A simulated subnet in which gates learn whom to ask, many seeds side by side.

The subnet: 8 topics, n uids. The skill of a uid in a topic is clip(0.45 + 0.12 q + 0.20 s, 0, 1): q is a standard
normal number of the uid, s one of uid and topic. A reward is clip(skill + 0.15 e, 0, 1) with fresh normal e. At each
step the topic is drawn evenly, the prompt evenly among those of the topic; k = 10 uids are asked, and nothing but
their rewards is told. Half-way 20 % of the hotkeys are replaced by newcomers with skills of their own.
"""

import copy
import math
from types import SimpleNamespace

import torch

from gate_prompts import TEMPLATES, prompts
from prompting_nb.validators.bayes import BayesianGatingModel
from prompting_nb.encoding.encoder import Encoder
from prompting_nb.validators.selection import narrowing, thompson

STEPS, K, NOISE, REPLACED = 6000, 10, 0.15, 0.2
TOPICS = len(TEMPLATES)


def embedded(report: bool, per_topic: int = 400) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    "Prompts, their embeddings (prompts, hidden) and topics (prompts,)."
    texts, topics = prompts(report, per_topic)
    encoder = Encoder("minilm")
    return texts, torch.stack([encoder(text) for text in texts]), torch.tensor(topics)


def _skills(count: int, generator: torch.Generator) -> torch.Tensor:
    level, own = torch.randn(count, 1, generator=generator), torch.randn(count, TOPICS, generator=generator)
    return (0.45 + 0.12 * level + 0.20 * own).clamp(0, 1)


class Subnet:
    "The same subnet, prompts and noise for every method: skills and draws of several seeds."

    def __init__(self, n: int, seeds: list[int], topics: torch.Tensor, steps: int = STEPS):
        self.n, self.seeds, self.steps = n, seeds, steps
        before, after, self.newcomers, self.prompts, self.noise = [], [], [], [], []
        for seed in seeds:
            g = torch.Generator().manual_seed(seed)
            skills = _skills(n, g)
            who = torch.randperm(n, generator=g)[:round(REPLACED * n)]
            changed = skills.index_copy(0, who, _skills(len(who), g))
            topic = torch.randint(TOPICS, (steps,), generator=g)
            per_topic = torch.bincount(topics)[0]
            self.prompts.append(topic * per_topic + torch.randint(int(per_topic), (steps,), generator=g))
            self.noise.append(NOISE * torch.randn(steps, K, generator=g))
            before.append(skills), after.append(changed), self.newcomers.append(who)
        self.skills = torch.stack(before), torch.stack(after)  # (seeds, n, topics)
        self.newcomers, self.noise = torch.stack(self.newcomers), torch.stack(self.noise)
        self.prompts, self.topics = torch.stack(self.prompts), topics

    def at(self, step: int) -> torch.Tensor:  # (seeds, n)
        "Skill of each uid for the prompt of a step."
        topic = self.topics[self.prompts[:, step]]
        return self.skills[step >= self.steps // 2][torch.arange(len(topic)), :, topic]

    def run(self, method, each=lambda: None) -> torch.Tensor:  # (seeds, steps, 3): got, random, oracle
        "Let a method choose and learn. It gets the rewards of those it asked."
        out = torch.empty(len(self.seeds), self.steps, 3)
        for step in range(self.steps):
            if step == self.steps // 2:
                method.replaced(self.newcomers)
            skills, prompt = self.at(step), self.prompts[:, step]
            uids = method.choose(prompt)
            got = skills.gather(1, uids)
            method.learn(prompt, uids, (got + self.noise[:, step]).clamp(0, 1))
            out[:, step] = torch.stack([got.mean(1), skills.mean(1), skills.topk(K, 1).values.mean(1)], 1)
            each()
        return out

    def best_fixed(self) -> torch.Tensor:  # (seeds, steps, 3)
        "The K uids with the best mean skill, in hindsight, before the change and after it."
        out = torch.empty(len(self.seeds), self.steps, 3)
        for step in range(self.steps):
            skills = self.at(step)
            best = self.skills[step >= self.steps // 2].mean(2).topk(K, 1).indices
            out[:, step] = torch.stack([skills.gather(1, best).mean(1), skills.mean(1),
                                        skills.topk(K, 1).values.mean(1)], 1)
        return out


def closed(result: torch.Tensor, after: bool) -> torch.Tensor:  # (seeds,)
    "Share of the gap from random to oracle, over the last third before the change or after it."
    half = result.shape[1] // 2
    end = 2 * half if after else half
    got, chance, best = result[:, end - half // 3:end].sum(1).T
    return (got - chance) / (best - chance)


def curve(result: torch.Tensor, bins: int = 60) -> torch.Tensor:  # (seeds, bins)
    "The same share in spans of steps."
    got, chance, best = result.unflatten(1, (bins, -1)).sum(2).unbind(2)
    return (got - chance) / (best - chance)


class Table(torch.nn.Module):
    "Stands in for the encoder: embeddings that were computed before. A message is the number of a prompt."

    def __init__(self, embeddings: torch.Tensor):
        super().__init__()
        self.embeddings, self.hidden_size, self.model_name = embeddings, embeddings.shape[1], "minilm"

    def __deepcopy__(self, memo) -> "Table":  # gates share the embeddings
        return self

    def forward(self, message: str) -> torch.Tensor:
        return self.embeddings[int(message)]


class Ours:
    "The Bayesian gate with Thompson sampling, as `prompting-nb loop` uses it: a gate per seed."

    def __init__(self, subnet: Subnet, embeddings: torch.Tensor, gating: dict | None = None, epsilon: float = 0.01,
                 **width):
        self.epsilon, self.width, self.answers, n = epsilon, width, 0, subnet.n
        hotkeys = SimpleNamespace(hotkeys=[str(uid) for uid in range(n)])
        first = BayesianGatingModel(hotkeys, {"gating": {"model_name": "minilm", **(gating or {})}}, num_uids=n)
        first.encoder = Table(embeddings)
        self.gates = [copy.deepcopy(first) for _ in subnet.seeds]
        self.generators = [torch.Generator().manual_seed(1000 + seed) for seed in subnet.seeds]

    def choose(self, prompt: torch.Tensor) -> torch.Tensor:
        width = narrowing(self.answers / self.gates[0].num_uids, **self.width)
        self.scores, chosen = [], []
        for gate, number, generator in zip(self.gates, prompt.tolist(), self.generators):
            scores, sd = gate.posterior(str(number))
            uids = thompson(scores, sd, K, width=width, epsilon=self.epsilon, generator=generator).uids
            chosen.append(uids), self.scores.append(scores[uids])
        return torch.stack(chosen)

    def learn(self, prompt: torch.Tensor, uids: torch.Tensor, rewards: torch.Tensor) -> None:
        self.answers += uids.shape[1]
        for gate, scores, reward in zip(self.gates, self.scores, rewards):
            gate.backward(scores, reward)

    def replaced(self, newcomers: torch.Tensor) -> None:
        for gate, who in zip(self.gates, newcomers):
            hotkeys = dict(gate.hotkeys)
            hotkeys |= {int(uid): f"{uid} again" for uid in who}
            gate.resync(None, SimpleNamespace(hotkeys=list(hotkeys.values()), uids=list(hotkeys)))


def explore(uids: torch.Tensor, n: int, share: float, generator: torch.Generator) -> torch.Tensor:
    "With probability `share`, and independently for each seed, K uids by chance instead."
    anyone = torch.rand(len(uids), n, generator=generator).topk(K, 1).indices
    return torch.where(torch.rand(len(uids), 1, generator=generator) < share, anyone, uids)


class Linear:
    "LinUCB and LinTS, a ridge regression for each uid on principal components (Li 2010; Agrawal & Goyal 2013)."

    def __init__(self, subnet: Subnet, embeddings: torch.Tensor, known: torch.Tensor, rule: str, width: float,
                 components: int = 16, ridge: float = 1.0, scale: float = 3.0):
        seeds, n, d = len(subnet.seeds), subnet.n, components + 1
        mean = known.mean(0)
        axes = torch.linalg.svd(known - mean, full_matrices=False).Vh[:components]
        self.phi = torch.cat([torch.ones(len(embeddings), 1), scale * (embeddings - mean) @ axes.T], 1)
        self.inverse = (torch.eye(d) / ridge).repeat(seeds, n, 1, 1)
        self.weight, self.start = torch.zeros(seeds, n, d), torch.eye(d) / ridge
        self.weight[..., 0] = 0.5
        self.rule, self.width, self.rows = rule, width, torch.arange(seeds)[:, None]
        self.generator = torch.Generator().manual_seed(7)

    def choose(self, prompt: torch.Tensor) -> torch.Tensor:
        phi = self.phi[prompt]
        spread = (self.inverse @ phi[:, None, :, None])[..., 0]
        sd = NOISE * (spread @ phi[:, :, None])[..., 0].clamp(min=0).sqrt()
        noise = torch.randn(sd.shape, generator=self.generator) if self.rule == "ts" else 1.0
        scores = (self.weight @ phi[:, :, None])[..., 0] + self.width * sd * noise
        return (scores + 1e-6 * torch.rand(sd.shape, generator=self.generator)).topk(K, 1).indices

    def learn(self, prompt: torch.Tensor, uids: torch.Tensor, rewards: torch.Tensor) -> None:
        phi = self.phi[prompt][:, None]  # (seeds, 1, d)
        inverse = self.inverse[self.rows, uids]
        spread = (inverse @ phi[..., None])[..., 0]
        gain = spread / (1 + (spread * phi).sum(2, keepdim=True))
        error = rewards - (self.weight[self.rows, uids] * phi).sum(2)
        self.weight[self.rows, uids] += gain * error[..., None]
        self.inverse[self.rows, uids] = inverse - gain[..., None] * spread[..., None, :]

    def replaced(self, newcomers: torch.Tensor) -> None:
        self.inverse[self.rows, newcomers] = self.start
        self.weight[self.rows, newcomers] = torch.eye(self.weight.shape[2])[0] * 0.5


class Nearest:
    "For each uid the mean of its 40 answers to the nearest prompts, out of its last 160; some chance."

    def __init__(self, subnet: Subnet, embeddings: torch.Tensor, neighbours: int = 40, last: int = 160,
                 share: float = 0.05, steps: float = 300, pull: float = 0.0):
        seeds = len(subnet.seeds)
        self.similar = (embeddings @ embeddings.T).half().float()
        self.asked = torch.zeros(seeds, subnet.n, last, dtype=torch.long)
        self.rewards, self.count = torch.zeros(seeds, subnet.n, last), torch.zeros(seeds, subnet.n, dtype=torch.long)
        self.neighbours, self.last, self.share, self.steps, self.pull, self.step = neighbours, last, share, steps, pull, 0
        self.rows, self.generator = torch.arange(seeds)[:, None], torch.Generator().manual_seed(7)

    def choose(self, prompt: torch.Tensor) -> torch.Tensor:
        there = torch.arange(self.last) < self.count[..., None]
        similar = self.similar[prompt[:, None, None], self.asked].masked_fill(~there, -2.0)
        best, places = similar.topk(self.neighbours, dim=2)
        valid = (best > -2).float()
        sums = (self.rewards.gather(2, places) * valid).sum(2)
        scores = torch.where(self.count > 0, (sums + 0.5 * self.pull) / (valid.sum(2) + self.pull).clamp(min=1e-6), 2.0)
        scores += 1e-6 * torch.rand(scores.shape, generator=self.generator)
        share = self.share + (1 - self.share) * max(0.0, 1 - self.step / self.steps)
        return explore(scores.topk(K, 1).indices, scores.shape[1], share, self.generator)

    def learn(self, prompt: torch.Tensor, uids: torch.Tensor, rewards: torch.Tensor) -> None:
        place = self.count[self.rows, uids] % self.last
        self.asked[self.rows, uids, place] = prompt[:, None].expand_as(uids)
        self.rewards[self.rows, uids, place] = rewards
        self.count[self.rows, uids] += 1
        self.step += 1

    def replaced(self, newcomers: torch.Tensor) -> None:
        self.count[self.rows, newcomers] = 0


class Documented:
    "The documented loss with SGD 0.01 and momentum 0.9 on the asked uids; `accumulate`: without `zero_grad`."

    def __init__(self, subnet: Subnet, embeddings: torch.Tensor, accumulate: bool, share: float = 0.05,
                 steps: float = 300):
        seeds, hidden = len(subnet.seeds), embeddings.shape[1]
        self.x = torch.cat([embeddings, torch.ones(len(embeddings), 1)], 1)
        self.generator = torch.Generator().manual_seed(7)
        self.weight = torch.empty(seeds, subnet.n, hidden + 1)
        self._begin(self.weight)
        self.momentum, self.gradient = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.accumulate, self.share, self.steps, self.step = accumulate, share, steps, 0
        self.rows = torch.arange(seeds)[:, None]

    def _begin(self, rows: torch.Tensor) -> None:
        rows.uniform_(-1 / math.sqrt(rows.shape[-1] - 1), 1 / math.sqrt(rows.shape[-1] - 1), generator=self.generator)
        rows[..., -1] = 0

    def choose(self, prompt: torch.Tensor) -> torch.Tensor:
        self.scores = (self.weight @ self.x[prompt][:, :, None])[..., 0]
        share = self.share + (1 - self.share) * max(0.0, 1 - self.step / self.steps)
        return explore(self.scores.topk(K, 1).indices, self.scores.shape[1], share, self.generator)

    def learn(self, prompt: torch.Tensor, uids: torch.Tensor, rewards: torch.Tensor) -> None:
        p, q = self.scores.gather(1, uids).softmax(1), rewards.softmax(1)
        off = 2 * (p - q) / K
        by_score = p * (off - (p * off).sum(1, keepdim=True))
        if not self.accumulate:
            self.gradient.zero_()
        self.gradient[self.rows, uids] += by_score[..., None] * self.x[prompt][:, None]
        self.momentum.mul_(0.9).add_(self.gradient)
        self.weight.sub_(self.momentum, alpha=0.01)
        self.step += 1

    def replaced(self, newcomers: torch.Tensor) -> None:
        fresh = torch.empty(*newcomers.shape, self.weight.shape[2])
        self._begin(fresh)
        self.weight[self.rows, newcomers] = fresh
        self.momentum[self.rows, newcomers] = 0
        self.gradient[self.rows, newcomers] = 0
