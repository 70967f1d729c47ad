"""Gates on recorded models: learn online from some prompts, then choose for prompts held out.

A held-out fifth of the prompts is set aside, anew for every seed. On the rest a gate learns: several passes in random
order, K uids asked at each prompt, nothing but their scores told. Then it is frozen and chooses for the held-out fifth.
Settings of the peers are chosen on a fifth of the *training* prompts, with full scores (more than they get online).
"""

import csv
import gzip
import re
from types import SimpleNamespace

import numpy as np
import torch

from gate_learning import K, Table
from prompting_nb.config import InputError
from prompting_nb.validators.bayes import BayesianGatingModel
from prompting_nb.encoding.encoder import Encoder
from prompting_nb.validators.selection import narrowing, thompson

PASSES = 4


def recorded(path: str) -> tuple[list[str], list[str], torch.Tensor, torch.Tensor]:
    "Models, prompts, embeddings (prompts, hidden) and scores (prompts, models), 0 where there is none."
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}. Give prompts-scores.csv.gz to --scores") from None
    scores = torch.tensor([[float(value or 0) for value in row[2:]] for row in rows])
    encoder = Encoder("minilm")
    return header[2:], [row[0] for row in rows], torch.stack([encoder(row[0]) for row in rows]), scores


def online(choose, learn, scores: torch.Tensor, train: torch.Tensor, generator: torch.Generator) -> None:
    "Several passes over the training prompts in random order."
    for _ in range(PASSES):
        for prompt in train[torch.randperm(len(train), generator=generator)].tolist():
            uids = choose(prompt)
            learn(prompt, uids, scores[prompt, uids])


class Ours:
    "The Bayesian gate with Thompson sampling, as in the loop."

    def __init__(self, x: torch.Tensor, n: int, seed: int):
        metagraph = SimpleNamespace(hotkeys=[str(uid) for uid in range(n)])
        self.gate = BayesianGatingModel(metagraph, {"gating": {"model_name": "minilm"}}, num_uids=n)
        self.gate.encoder, self.answers, self.n = Table(x), 0, n
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, prompt):
        self.scores, sd = self.gate.posterior(str(prompt))
        width = narrowing(self.answers / self.n)
        return thompson(self.scores, sd, K, width=width, epsilon=0.01, generator=self.generator).uids

    def learn(self, prompt, uids, rewards):
        self.answers += len(uids)
        self.gate.backward(self.scores[uids], rewards)

    def predict(self, prompts):
        self.gate.reflect()
        return torch.stack([self.gate(str(prompt)).detach() for prompt in prompts.tolist()])


class Ridge:
    "LinUCB and LinTS on 16 principal components of the training prompts."

    def __init__(self, x, n, seed, train, rule, ridge, width=0.5, components=16):
        mean = x[train].mean(0)
        axes = torch.linalg.svd(x[train] - mean, full_matrices=False).Vh[:components]
        self.phi = torch.cat([torch.ones(len(x), 1), (x - mean) @ axes.T], 1)
        start = torch.eye(components + 1) * ridge
        start[0, 0] = 1e-3  # the mean of a uid is hardly shrunk
        self.a, self.b = start.repeat(n, 1, 1), torch.zeros(n, components + 1)
        self.inverse, self.rule, self.width = torch.linalg.inv(self.a), rule, width
        self.seen = torch.zeros(len(x), n, dtype=torch.bool)  # an answer that comes again counts once
        self.generator = torch.Generator().manual_seed(seed)

    def _mean(self, phi):
        return (self.inverse @ self.b[..., None])[..., 0] @ phi

    def choose(self, prompt):
        phi = self.phi[prompt]
        sd = ((self.inverse @ phi) @ phi).clamp(min=0).sqrt()
        noise = torch.randn(len(sd), generator=self.generator) if self.rule == "ts" else 1.0
        return (self._mean(phi) + 0.3 * self.width * sd * noise).topk(K).indices

    def learn(self, prompt, uids, rewards):
        new = ~self.seen[prompt, uids]
        uids, rewards, phi = uids[new], rewards[new], self.phi[prompt]
        self.seen[prompt, uids] = True
        spread = self.inverse[uids] @ phi
        self.inverse[uids] -= spread[:, :, None] * spread[:, None] / (1 + spread @ phi)[:, None, None]
        self.b[uids] += rewards[:, None] * phi

    def predict(self, prompts):
        return torch.stack([self._mean(self.phi[prompt]) for prompt in prompts.tolist()])


class Average:
    "Best-fixed and kNN: both remember all answers; asked are the best on average, and some by chance."

    def __init__(self, x, n, seed, neighbours: int | None, share: float = 0.2):
        self.x, self.neighbours, self.share = x, neighbours, share
        self.score = torch.full((len(x), n), torch.nan)
        self.sum, self.count = torch.zeros(n), torch.zeros(n)
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, prompt):
        if torch.rand((), generator=self.generator) < self.share:
            return torch.randperm(len(self.sum), generator=self.generator)[:K]
        return torch.where(self.count > 0, self.sum / self.count, 2.0).topk(K).indices

    def learn(self, prompt, uids, rewards):
        self.score[prompt, uids] = rewards
        self.sum[uids] += rewards
        self.count[uids] += 1

    def predict(self, prompts):
        mean = self.score.nanmean(0).nan_to_num(0.0)
        if self.neighbours is None:
            return mean.repeat(len(prompts), 1)
        out = []
        for prompt in prompts.tolist():  # for each uid its own nearest answers
            similar = (self.x @ self.x[prompt])[:, None].masked_fill(self.score.isnan(), -2.0)
            best, place = similar.topk(self.neighbours, dim=0)
            near = self.score.gather(0, place).where(best > -2, torch.nan).nanmean(0)
            out.append(torch.where(near.isnan(), mean, near))
        return torch.stack(out)


def _top(predicted: torch.Tensor, truth: torch.Tensor) -> list[float]:
    "Mean score of the top 1 and of the top 3."
    order = predicted.argsort(1, descending=True)
    return [truth.gather(1, order[:, :k]).mean().item() for k in (1, 3)]


def _chosen(make, options, x, scores, inner, seed):
    "The option that does best on a fifth of the training prompts after learning from the rest."
    generator = torch.Generator().manual_seed(seed)
    cut = len(inner) // 5
    shuffled = inner[torch.randperm(len(inner), generator=generator)]
    kept, rest = shuffled[:cut], shuffled[cut:]
    results = []
    for option in options:
        peer = make(option, rest)
        online(peer.choose, peer.learn, scores, rest, generator)
        results.append(_top(peer.predict(kept), scores[kept])[0])
    return options[int(np.argmax(results))]


# ridge and width
RIDGES = ((0.0001, 0.5), (0.001, 0.5), (0.01, 0.5), (0.03, 0.5), (0.1, 0.5), (0.3, 0.5), (1, 0.5), (3, 0.5), (10, 0.5),
          (30, 0.5), (100, 0.5), (300, 0.5), (3, 1.5))


def one_split(seed: int, x: torch.Tensor, scores: torch.Tensor) -> dict:
    "Top-1 and top-3 on the held-out fifth of one split, and what is needed for cost curves."
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    held, train, n = order[:len(x) // 5], order[len(x) // 5:], scores.shape[1]
    makes = {
        "kNN": (lambda option, part: Average(x, n, seed, option), (5, 10, 20, 40, 80, 160)),
        "LinUCB": (lambda option, part: Ridge(x, n, seed, part, "ucb", *option), RIDGES),
        "LinTS": (lambda option, part: Ridge(x, n, seed, part, "ts", *option), RIDGES),
    }
    methods = {"ours": Ours(x, n, seed), "best fixed": Average(x, n, seed, None)}
    chosen = {}
    for name, (make, options) in makes.items():
        chosen[name] = _chosen(make, options, x, scores, train, seed)
        methods[name] = make(chosen[name], train)
    methods["kNN-40"] = Average(x, n, seed, 40)
    found, predicted = {}, {}
    for name, method in methods.items():
        online(method.choose, method.learn, scores, train, generator)
        predicted[name] = method.predict(held)
        found[name] = _top(predicted[name], scores[held])
    found["oracle"], found["random"] = _top(scores[held], scores[held]), [scores[held].mean().item()] * 2
    return {"found": found, "predicted": {k: predicted[k] for k in ("ours", "kNN", "best fixed")}, "held": held,
            "chosen": chosen}


_PRICES = {"gpt4": 300, "gpt-3.5": 20, "gpt35": 20, "claude-instant": 20, "claude": 150, "davinci": 175, "phi-2": 2.7,
           "alpaca-farm": 7, "text_davinci": 175, "baize": 13, "humpback": 70}


def price(model: str) -> float:
    """A made-up cost of a model's answer: its size in billions, read from the name where it says so, else a guess.

    It stands in for a price list. Nothing but the shape of the cost-quality curve should be read into it.
    """
    if size := re.search(r"(\d+(?:\.\d+)?)b(?![a-z])", model.lower().replace("8x7b", "47b")):
        return float(size[1])
    return next((value for name, value in _PRICES.items() if name in model.lower()), 30.0)


def cost_curve(predicted: torch.Tensor, truth: torch.Tensor, prices: torch.Tensor) -> tuple[list, float]:
    """Mean (cost, quality) as cost gets more important, and AIQ as RouterBench defines it (Hu and others 2024).

    AIQ is the area under the non-decreasing convex hull of the points, divided by the range of costs; the range here
    is that of all single models, so that the AIQs of several routers can be compared.
    """
    points = []
    for weight in np.concatenate([[0.0], np.geomspace(1e-5, 0.3, 40)]):
        pick = (predicted - weight * prices).argmax(1, keepdim=True)
        points.append((float(prices[pick].mean()), float(truth.gather(1, pick).mean())))
    return points, aiq(points, float(prices.min()), float(prices.max()))


def hull(points: list) -> list:
    "The upper convex hull of points that does not fall, from left to right."
    upper = []
    for cost, quality in sorted(points):
        if upper and quality <= upper[-1][1]:
            continue
        while upper and upper[-1][0] == cost:
            upper.pop()
        while len(upper) >= 2 and ((upper[-1][1] - upper[-2][1]) * (cost - upper[-2][0])
                                   <= (quality - upper[-2][1]) * (upper[-1][0] - upper[-2][0])):
            upper.pop()
        upper.append((cost, quality))
    return upper


def aiq(points: list, least: float, most: float) -> float:
    "The mean height of the hull between two costs: 0 left of its first point, level right of its last."
    costs = np.linspace(least, most, 5000)
    x, y = zip(*hull(points))
    return float(np.where(costs < x[0] - 1e-9, 0.0, np.interp(costs, x, y)).mean())
