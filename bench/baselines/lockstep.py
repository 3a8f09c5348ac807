"""Search as scripts run it, for baselines: all draws of a round, then all scores of that round, one problem at a time.

The method is the package's own program, so every contender searches the same tree: the same draws with the same identities, and
steps of the same length where lengths are drawn. What a baseline brings is how steps are written and how paths are read.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

import numpy as np
from torch import Tensor

from tts_engine.branch import Branch, Finish, root_branch
from tts_engine.draws import Limits
from tts_engine.policy import ANSWER_SIGN
from tts_engine.sampling import Sampling, philox_key, sample
from tts_engine.search import Draw, Driver, Method
from tts_engine.steps import CLOSED, StepRule
from tts_engine.tasks.problems import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One problem and all that decides what is drawn for it.

    scores: by identity, what branches are chosen by, whatever the PRM says of them. Random weights give other scores in every
    arithmetic; with ours here, all contenders keep the same branches.
    """

    method: Method
    problem: Problem
    prompt: list[int]
    rule: StepRule
    limits: Limits
    seed: int = 0
    scores: Mapping[int, float] | None = None


@dataclass(slots=True, kw_only=True)
class Spent:
    """What a search took. Tokens drawn and steps scored are equal for all contenders, or they did not do the same work."""

    tokens_drawn: int = 0
    steps_scored: int = 0
    policy_tokens: int = 0  # that went through the layers, padding among them
    prm_tokens: int = 0
    policy_seconds: float = 0.0
    prm_seconds: float = 0.0
    policy_kv_bytes: int = 0  # the most at once
    prm_kv_bytes: int = 0
    nodes: list[Branch] = field(default_factory=list, repr=False)  # every step drawn, in the order they closed


class Rows:
    """The draws of one round, a row each, until their steps close, or their trajectories where they go to the end."""

    def __init__(self, task: Task, driver: Driver, draws: Sequence[Draw]) -> None:
        self.task, self.children = task, [draw.branch for draw in draws]
        self.parents = list(self.children)  # the branches whose path is to be read before a row's first token
        self.nodes: list[Branch] = []
        self.live = np.arange(len(draws))  # rows that still draw
        self._driver, self._draws = driver, list(draws)
        self._tokens: list[list[int]] = [[] for _ in draws]
        self._state, self._room, self._position = (np.zeros(len(draws), np.int64) for _ in range(3))
        self._identity = np.zeros(len(draws), np.uint64)
        self._key = np.array(philox_key(task.seed, task.problem.id), np.uint32)
        self._sampling = Sampling(temperature=task.method.temperature)
        for row, draw in enumerate(draws):
            self._begin(row, draw)

    @property
    def temperature(self) -> float:
        return self._sampling.temperature

    def sample(self, logits: Tensor) -> np.ndarray:
        """Tokens int64 of the live rows from their logits [R, V], as the package draws them."""
        rows, count = self.live, len(self.live)
        keys = np.broadcast_to(self._key, (count, 2))
        return sample(logits.float(), np.arange(count), self._sampling, keys, self._identity[rows], self._position[rows])

    def take(self, tokens: np.ndarray) -> None:
        """One more token for each live row; rows that are done leave `live`."""
        rows, rule = self.live, self.task.rule
        self._state[rows] = rule.advance(tokens, self._state[rows])
        self._position[rows] += 1
        going = []
        for row, token, ended in zip(rows.tolist(), tokens.tolist(), rule.eos[tokens], strict=True):
            own = self._tokens[row]
            own.append(token)
            at_boundary = self._state[row] == CLOSED
            cut = not ended and not at_boundary and len(own) >= self._room[row]
            if not (ended or at_boundary or cut) or self._goes_on(row, self._closed(row, ended, cut)):
                going.append(row)
        self.live = np.array(going, np.int64)

    def _begin(self, row: int, draw: Draw) -> None:
        task = self.task
        self._draws[row], self._tokens[row], self._identity[row] = draw, [], draw.identity
        self._state[row] = task.rule.start(draw.identity, (int(self._key[0]), int(self._key[1])))
        self._room[row] = task.limits.step_room(draw.branch.num_tokens, len(task.prompt))
        self._position[row] = len(task.prompt) + draw.branch.num_tokens

    def _closed(self, row: int, ended: bool, cut: bool) -> Branch:
        task, draw = self.task, self._draws[row]
        text = task.rule.text(self._tokens[row])
        finish = Finish.EOS if ended else Finish.LENGTH if cut else Finish.ANSWER if ANSWER_SIGN in text else None
        child = Branch(draw.branch, tuple(self._tokens[row]), text, draw.identity, draw.lane, draw.draw, finish)
        if task.limits.step_room(child.num_tokens, len(task.prompt)) <= 0:
            child = child.ended(Finish.LENGTH)
        if draw.to_end and child.depth >= task.method.max_steps:
            child = child.ended(Finish.DEPTH)
        return child

    def _goes_on(self, row: int, child: Branch) -> bool:
        self.nodes.append(child)
        self.children[row] = child
        draw = self._draws[row]
        if draw.to_end and not child.finished:
            self._begin(row, self._driver.next_draw(child, draw.lane, to_end=True))
            return True
        return False


class Writer(Protocol):
    def write(self, rows: Rows, spent: Spent) -> None:
        """Draw for the rows until none is live; add to the policy's tokens and bytes."""
        ...


class Reader(Protocol):
    def read(self, branches: Sequence[Branch], spent: Spent) -> list[list[float]]:
        """A score for every step of every branch; add to the PRM's tokens and bytes."""
        ...


def search(task: Task, policy: Writer, prm: Reader | None = None) -> tuple[list[Branch], Spent]:
    """Run a task to its end: the branches to vote on, and what they took."""
    driver = Driver(task.method.program(root_branch(task.prompt, task.problem.problem)))
    spent = Spent()
    while not driver.done:
        asks = driver.asks()
        drawing, scoring = ([ask for ask in asks if bool(ask.draws) is draws] for draws in (True, False))
        if drawing:
            rows = Rows(task, driver, [draw for ask in drawing for draw in ask.draws])
            began = time.perf_counter()
            policy.write(rows, spent)
            spent.policy_seconds += time.perf_counter() - began
            spent.tokens_drawn += sum(len(node.tokens) for node in rows.nodes)
            spent.nodes += rows.nodes
            children = iter(rows.children)
            for ask in drawing:
                driver.answer(ask, list(islice(children, len(ask.draws))))
        if scoring:
            assert prm is not None, f"{task.method.name} needs a PRM"
            branches = [branch for ask in scoring for branch in ask.branches]
            began = time.perf_counter()
            scores = prm.read(branches, spent)
            spent.prm_seconds += time.perf_counter() - began
            answered = iter([scored(branch, own, task.scores, spent) for branch, own in zip(branches, scores, strict=True)])
            for ask in scoring:
                driver.answer(ask, list(islice(answered, len(ask.branches))))
    return driver.result, spent


def path_ids(branch: Branch) -> list[int]:
    """The policy's token ids of a whole path, the prompt's among them."""
    return [token for step in branch.path for token in step.tokens]


def scored(branch: Branch, scores: Sequence[float], chosen_by: Mapping[int, float] | None, spent: Spent) -> Branch:
    """The branch anew, with a score on every step; a step that has one keeps it."""
    parent = branch.path[0]
    for step, score in zip(branch.steps, scores, strict=True):
        if step.score is None:
            spent.steps_scored += 1
            score = score if chosen_by is None else chosen_by[step.identity]
        else:
            score = step.score
        parent = replace(step, parent=parent, score=score)
    return parent
