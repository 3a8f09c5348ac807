"""The engine: many searches over one policy and one PRM, on one machine.

Joins the drivers of searches with the policy and the scorer; its loop decides only whose turn it is. Nothing here is global:
two engines in one process, or in two threads, never meet.
"""

import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import GEN_CLOSED, getgeneratorstate
from pathlib import Path
from types import TracebackType
from typing import Self

from .attention import make_backend, refuse_windows
from .attention.triton_tree import TritonTreeAttention
from .branch import Branch, root_branch
from .config import DTYPES, EngineConfig, first_split
from .draws import DrawContext, Limits
from .errors import EngineError, MissingExtra, OutOfBlocks
from .graphs import DecodeGraphs
from .kv.admission import Admission
from .kv.budget import PATH_TOKENS, Budget
from .ledger import Ledger, Phases, Stopwatch
from .models import heads
from .models.tokenizer import chat_template, encode_prompt, end_ids, load_tokenizer, token_bytes
from .models.weights import SOURCES, Checkpoint, load_decoder, resolve_checkpoint
from .policy import Policy
from .prm.families import FAMILIES, recognise, refuse_as_policy
from .prm.scorer import ScoreContext, Scorer
from .prm.spec import TokenPair, TwoClassHead
from .results import Choice, Chooser, SearchResult, conclude, read_answers
from .runner import ModelRunner
from .sampling import Sampling, philox_key
from .search import Adaptive, Ask, Driver, Method
from .search.allocation import Allocation, Cost, Standing
from .steps import CLOSED, StepRule, step_rule
from .tasks.grader import Grader
from .tasks.problems import Problem
from .tasks.prompts import messages

Failed = Callable[[Problem, EngineError], None]  # who is told of a problem that cannot be searched to its end


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One problem that can be searched with one method. opening: the PRM's token ids before the first step; none where no PRM
    takes part. needs: blocks of each model for one branch at full depth."""

    problem: Problem
    prompt: list[int]
    opening: list[int]
    limits: Limits
    needs: list[int]


@dataclass(slots=True, eq=False)
class _Search:
    """One problem under way. choice: the method it is searched with; None for a pilot, whose choice is still to come. held: draws
    that wait for their share of a budget."""

    problem: Problem
    prepared: dict[Method, _Prepared]
    choice: Choice | None
    method: Method
    driver: Driver
    drawing: DrawContext
    scoring: ScoreContext | None
    nodes: dict[int, Branch]
    ledger: Ledger
    started: float
    before: Phases  # what the stopwatch showed then
    expected: list[int]  # bytes of keys and values that it will come to, the policy's first
    held: Ask | None = None
    cost: Cost = Cost()  # until then


class Engine:
    """`search` problems with a method; `stream` the results as they come. Use it as a context manager, or `close` it."""

    def __init__(self, config: EngineConfig, policy: Policy, scorer: Scorer | None, tokenizer, grader: Grader) -> None:
        self.config, self.policy, self.scorer = config, policy, scorer
        self.tokenizer, self.grader = tokenizer, grader
        self._ticked = "policy"  # the phase that the last tick was of
        self._newest: Callable[[], Generator | None] = lambda: None  # of the streams that began, as long as somebody has it
        room = sum(runner.cache.num_bytes for runner in self.runners)
        self.budget = Budget(self.runners, room, at_rest=self._at_rest)
        self.admission = Admission()
        policy.more_room = self.budget.press

    @classmethod
    def from_pretrained(cls, policy: str | Path, prm: str | Path | None = None, **settings) -> Self:
        """Load a policy, and a PRM where one is given, from local directories or hub ids; settings are EngineConfig's.

        Raises ModelError for a checkpoint that cannot be used, EngineError for a senseless setting.
        """
        try:
            config = EngineConfig(**settings)
        except TypeError:
            known = ", ".join(EngineConfig.__slots__)
            raise EngineError(f"unknown setting among {', '.join(sorted(settings))}; known: {known}") from None
        dtype, device = DTYPES[config.dtype], config.device
        names = [name for name in (policy, prm) if name is not None]
        checkpoints = [SOURCES[config.load](resolve_checkpoint(name, config.load)) for name in names]
        refuse_as_policy(checkpoints[0].config, checkpoints[0].tensor_names, str(policy))
        backends = [make_backend(config.attention, device, deterministic=config.deterministic) for _ in checkpoints]
        for backend, checkpoint in zip(backends, checkpoints, strict=True):
            refuse_windows(backend, checkpoint.spec.windows, str(checkpoint.directory))
        decoders = [load_decoder(c, dtype=dtype, device=device, deterministic=config.deterministic) for c in checkpoints]
        split = first_split(config, [checkpoint.spec for checkpoint in checkpoints])
        runners = [ModelRunner(decoder, backend, num_blocks=num_blocks, block_size=config.block_size)
                   for decoder, backend, num_blocks in zip(decoders, backends, split, strict=True)]  # fmt: skip
        tokenizer = load_tokenizer(checkpoints[0].directory)
        spec = decoders[0].spec
        rule = step_rule(config.steps, token_bytes(tokenizer), end_ids(tokenizer, checkpoints[0].directory), spec.vocab_size)
        scorer = make_scorer(runners[1], checkpoints[1], config.prm_family) if prm is not None else None
        return cls(config, make_policy(config, runners[0], rule), scorer, tokenizer, Grader())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the grader's worker, if one was started."""
        self.grader.close()

    def forget(self) -> None:
        """Drop all idle KV, so that the next search pays its own way. Speed and the ledger change, results do not."""
        for runner in self.runners:
            runner.tree.evict_all()

    def _at_rest(self) -> bool:
        return not self.policy.under_way and not (self.scorer is not None and self.scorer.under_way)

    @property
    def runners(self) -> list[ModelRunner]:
        """The policy's, and the PRM's where there is one."""
        return [self.policy.runner] + ([self.scorer.runner] if self.scorer is not None else [])

    def search(self, problems: str | Problem | Sequence[str | Problem], method: Method | Chooser, *,
               seed: int = 0) -> list[SearchResult]:  # fmt: skip
        """Search all problems side by side; one result each, in their order. A Chooser chooses each problem's method."""
        given = as_problems(problems)
        by_id = {result.problem.id: result for result in self.stream(given, method, seed=seed)}
        return [by_id[problem.id] for problem in given]

    def limits(self, problem: Problem, method: Method) -> Limits:
        """Where a search would cut its draws. Raises EngineError where the problem cannot be searched with that method."""
        return self._prepare(problem, method).limits

    def stream(self, problems: str | Problem | Sequence[str | Problem], method: Method | Chooser, *, seed: int = 0,
               failed: Failed | None = None) -> Iterator[SearchResult]:  # fmt: skip
        """The same, each result as soon as its search is over. Closing the iterator abandons the rest.

        What goes wrong in one problem ends that problem, `failed` is told why, and the others lose nothing: a prompt that does not
        fit the model, a branch that would not fit the KV budget however much were evicted, logits or scores that are no numbers,
        text that the PRM cannot read, more seconds than config.timeout, a program or a grader that raises, memory that does not
        suffice for one row. Without `failed` it is raised, before anything is computed where that can be.
        """
        methods = method.methods if isinstance(method, Chooser) else (method,)
        for one in methods:
            if one.uses_prm and self.scorer is None:
                raise EngineError(f"{one.name} needs a PRM and this engine has none: give prm=")
            if isinstance(method, Chooser) and isinstance(one, Adaptive) and one.budget is not None:
                raise EngineError(f"{method.name} chooses problem by problem, and a budget is for all problems: leave it out")
        prepared: list[dict[Method, _Prepared]] = []
        for problem in as_problems(problems):
            with self._on_its_own(problem, failed, []):
                prepared.append({one: self._prepare(problem, one) for one in methods})
        own: list[Callable[[], Generator | None]] = []
        stream = self._stream(prepared, method, seed, failed, own)
        own.append(weakref.ref(stream))
        return stream

    def _stream(self, prepared: list[dict[Method, _Prepared]], method: Method | Chooser, seed: int, failed: Failed | None,
                own: Sequence[Callable[[], Generator | None]]) -> Generator[SearchResult, None, None]:  # fmt: skip
        """own: leads to this generator."""
        if (newest := self._newest()) is not None and getgeneratorstate(newest) != GEN_CLOSED:
            raise EngineError("this engine is searching already: exhaust or close that iterator first, or make a second engine")
        [self._newest] = own
        self._clear()
        waiting, running, watch = deque(prepared), list[_Search](), Stopwatch()
        budget = method.shared_budget if isinstance(method, Adaptive) else None
        allocation = Allocation(budget) if budget is not None else None
        try:
            while waiting or running:
                while waiting and self._has_place(running, waiting[0]) and self._reserve(running, waiting[0]):
                    one = waiting.popleft()
                    with self._on_its_own(next(iter(one.values())).problem, failed, running):
                        running.append(self._begin(one, method, seed))
                        self.budget.expect(self._expected_of_all(running))
                        running[-1].before = replace(watch.shared)
                        self._pass_on(running[-1])
                watch.share("rest", len(running))
                if allocation is not None and running and not waiting and _all_held(running):
                    self._share_out(running, allocation)
                else:
                    self._tick()
                    self.budget.look()
                    watch.share(self._ticked, len(running))
                for search in list(running):
                    try:  # at every tick, for every search: no context manager
                        if search.driver.stirred:
                            self._pass_on(search)
                        self._refuse_if_late(search)
                    except Exception as error:
                        self._end(search.problem, error, failed, running)
                    if allocation is not None and search not in running:
                        allocation.end(self._cost(search))
                watch.share("rest", len(running))
                for search in [search for search in running if search.driver.done]:
                    if allocation is not None:
                        allocation.end(self._cost(search))
                    with self._on_its_own(search.problem, failed, running):
                        result = self._result(search, seed)
                        running.remove(search)
                        search.ledger.phases.grading += watch.lap()
                        if search.choice is None:
                            running.append(self._go_on(search, method, seed, result))
                            self._pass_on(running[-1])
                        else:
                            search.ledger.phases.add(watch.since(search.before))
                            self._retire(search)
                            yield result
                            away = watch.lap()  # what is done with it is no time of the engine's
                            for other in running:
                                other.started += away
        finally:
            try:
                for search in running:
                    self._abandon(search)
            finally:
                self._clear()

    def _clear(self) -> None:
        """See that nothing is held or waits: an interrupt may have come where nobody noted yet what, or while that was given up."""
        for model in (self.policy, self.scorer):
            if model is not None:
                counts = model.runner.tree.counts()
                if model.busy or counts.filling or counts.pinned:
                    model.start_over()

    @contextmanager
    def _on_its_own(self, problem: Problem, failed: Failed | None, running: list[_Search]) -> Iterator[None]:
        """What goes wrong within is this problem's."""
        try:
            yield
        except Exception as error:
            self._end(problem, error, failed, running)

    def _end(self, problem: Problem, error: Exception, failed: Failed | None, running: list[_Search]) -> None:
        """A problem is no longer among those that run, and `failed` is told why. Raised where nobody is to be told, and where
        something is missing that other problems need, too."""
        for search in [search for search in running if search.problem is problem]:
            self._abandon(search)
            running.remove(search)
        if failed is None or isinstance(error, MissingExtra):
            raise error
        failed(problem, error if isinstance(error, EngineError) else EngineError(f"{type(error).__name__}: {error}"))

    def _refuse_if_late(self, search: _Search) -> None:
        timeout = self.config.timeout
        if timeout is not None and not search.driver.done and time.perf_counter() - search.started > timeout:
            raise EngineError(f"problem {search.problem.id} timed out after {timeout:g} s")

    def _has_place(self, running: list[_Search], prepared: dict[Method, _Prepared]) -> bool:
        """Whether another search is worth beginning now: there are rows for it, and it is not likely to need room that those under
        way need too."""
        if _all_held(running):
            return True
        if self.policy.num_open >= self.config.max_rows:
            return False
        return sum(self._expected_of_all(running)) + sum(self._expected(prepared)) <= self.budget.num_bytes

    def _expected_of_all(self, running: list[_Search]) -> list[int]:
        """Bytes of keys and values that the searches under way will come to, the policy's first; not of those that are held."""
        going = [search.expected for search in running if search.held is None]
        return [sum(each) for each in zip([0] * len(self.runners), *going, strict=True)]

    def _expected(self, prepared: dict[Method, _Prepared]) -> list[int]:
        """Bytes of keys and values that a search will come to, whichever of its methods is chosen."""
        each = [self.admission.expected(method, self._most(method, one)) for method, one in prepared.items()]
        return [max(of_model) for of_model in zip(*each, strict=True)]

    def _most(self, method: Method, prepared: _Prepared) -> list[int]:
        """Bytes that a search may come to if its branches are not unusually long."""
        share = min(1.0, PATH_TOKENS / prepared.limits.max_tokens)
        branches = [method.n, method.n if method.uses_prm else 0]
        return [int(share * count * blocks * runner.block_bytes)
                for count, blocks, runner in zip(branches, prepared.needs, self.runners, strict=False)]  # fmt: skip

    def _retire(self, search: _Search) -> None:
        """A search is over: what it kept makes room for others, and tells what the next one may keep."""
        kept = [search.drawing.steps.blocks(self.config.block_size) * self.policy.runner.block_bytes]
        self.policy.retire(search.drawing)
        if self.scorer is not None:
            kept.append(0)
            if search.scoring is not None:
                kept[1] = search.scoring.steps.blocks(self.config.block_size) * self.scorer.runner.block_bytes
                self.scorer.retire(search.scoring)
        self.admission.note(search.method, kept)

    def _reserve(self, running: list[_Search], prepared: dict[Method, _Prepared]) -> bool:
        """See that another search can always go on, beside those that run; False where it has to wait for some of them."""
        needs = [one.needs for each in (*(search.prepared for search in running), prepared) for one in each.values()]
        reserved = self.budget.reserve(needs)
        if not reserved and _all_held(running):
            raise OutOfBlocks("the memory that was granted for keys and values cannot be had any more: lower memory or kv_bytes")
        return reserved

    def _tick(self) -> None:
        """One forward of one model. The PRM's turn comes when there is a batch to read, or when more branches wait for it than for
        the policy: large batches pay. Or when what it says decides what idle rows draw. While it reads, the policy goes on."""
        scorer, policy = self.scorer, self.policy
        if scorer is not None and not scorer.under_way and (
            scorer.worth_a_tick or scorer.num_open > policy.num_open or policy.wants_scores()
        ):  # fmt: skip
            scorer.start()
            self._ticked = "prm"
        else:
            policy.tick()
            self._ticked = "policy"
        if scorer is not None and scorer.under_way and (scorer.ready or not policy.busy):
            scorer.finish()

    def _pass_on(self, search: _Search) -> None:
        """Hand on what closed and what a program asks, until it waits for a model or is done."""
        while search.driver.stirred:
            arrived, asks = search.driver.arrived(), search.driver.asks()
            for branch in arrived:
                assert self.scorer is not None and search.scoring is not None, "stream() refuses a method that lacks its PRM"
                self.scorer.offer(search.scoring, branch)
            for ask in asks:
                if ask.doubt is not None:
                    search.held, search.cost = ask, self._cost(search)
                elif ask.draws:
                    self.policy.submit(search.drawing, ask)
                else:
                    assert self.scorer is not None and search.scoring is not None, "stream() refuses a method that lacks its PRM"
                    self.scorer.submit(search.scoring, ask)
        self.policy.settle(search.drawing)

    def _share_out(self, running: list[_Search], allocation: Allocation) -> None:
        """One round of a budget: of the searches, all of which wait for it, some go on with the draws they ask for; where none may,
        all end without."""
        asks = [(search, search.held) for search in running if search.held is not None]
        standings = [Standing(search.problem.id, ask.doubt or 0.0, ask.draws[0].draw, len(ask.draws), search.cost)
                     for search, ask in asks]  # fmt: skip
        granted = allocation.grants(standings)
        for search, ask in asks:
            if search.problem.id in granted:
                search.held = None
                self.policy.submit(search.drawing, ask)
            elif not granted:
                search.held = None
                search.driver.resume(ask, [])

    def _cost(self, search: _Search) -> Cost:
        """What an ideal executor would have computed for the search by now: that much follows from its tree alone."""
        drawn, _ = search.drawing.steps.drawn()
        cost = Cost(drawn.tokens, self.policy.accounts.flops(drawn))
        if self.scorer is not None and search.scoring is not None:
            read = search.scoring.steps.read_once(self.scorer.spec.read_at)
            cost = Cost(cost.tokens + read.tokens, cost.flops + self.scorer.flops(read))
        return cost

    def _prepare(self, problem: Problem, method: Method) -> _Prepared:
        """What a search starts from, once it is certain that it can run."""
        runner, config = self.policy.runner, self.config
        if not problem.problem.strip():
            raise EngineError(f"problem {problem.id} is empty")
        system, user = messages(problem.problem, chat_template(self.tokenizer), config.system)
        ids = encode_prompt(self.tokenizer, user, system)
        largest, known = max(ids, default=0), runner.decoder.spec.vocab_size
        if largest >= known:
            raise EngineError(f"the policy's tokenizer writes token {largest} and its model knows {known} (vocab_size): they do "
                              "not belong together")  # fmt: skip
        positions = runner.decoder.spec.max_positions
        if len(ids) >= positions:
            raise EngineError(f"problem {problem.id} has a prompt of {len(ids)} tokens and the policy {positions} positions: "
                              "shorten it")  # fmt: skip
        opening, max_tokens, markers = list[int](), config.max_tokens, 0
        if method.uses_prm:
            assert self.scorer is not None, "stream() refuses a method that lacks its PRM"
            opening, markers = self.scorer.spec.opening(problem.problem), len(self.scorer.spec.step("", False)) * method.max_steps
            # A solution is cut so that the PRM, too, has positions for it; its tokens taken for as many as the policy's.
            prm_positions = self.scorer.runner.decoder.spec.max_positions
            max_tokens = min(max_tokens, prm_positions - len(opening) - markers)
            if max_tokens < 1:
                raise EngineError(f"problem {problem.id} takes {len(opening)} tokens as the PRM reads it, and the PRM's "
                                  f"{prm_positions} positions leave no room for a solution: shorten it, or take another "
                                  "PRM")  # fmt: skip
        room = min(max_tokens, positions - len(ids), config.max_step_tokens * method.max_steps)
        needs = [runner.blocks_for_branch(len(ids), room, method.max_steps)]
        if self.scorer is not None:
            prm_need = self.scorer.runner.blocks_for_branch(len(opening), room + markers, method.max_steps)
            needs.append(prm_need if method.uses_prm else 1)
        why = f"{len(ids)} prompt tokens, up to {room} tokens in {method.max_steps} steps"
        self.budget.refuse_unless_fits(f"problem {problem.id}", needs, why)
        limits = Limits(max_step_tokens=config.max_step_tokens, max_tokens=max_tokens, max_positions=positions)
        return _Prepared(problem, ids, opening, limits, needs)

    def _begin(self, prepared: dict[Method, _Prepared], method: Method | Chooser, seed: int) -> _Search:
        """A problem's first search: that of the method, or of the chooser's pilot, or of its choice where it needs none."""
        if not isinstance(method, Chooser):
            return self._start(prepared, method, Choice(method), seed)
        problem = next(iter(prepared.values())).problem
        pilot = method.pilot(problem)
        if pilot is not None:
            return self._start(prepared, pilot, None, seed)
        choice = method.choose(problem, None)
        return self._start(prepared, choice.method, choice, seed)

    def _go_on(self, pilot: _Search, method: Method | Chooser, seed: int, found: SearchResult) -> _Search:
        """The search that is chosen by what a pilot found."""
        assert isinstance(method, Chooser), "who is no Chooser has no pilot"
        choice = method.choose(pilot.problem, found)
        return self._start(pilot.prepared, choice.method, choice, seed, pilot)

    def _start(self, prepared_for: dict[Method, _Prepared], method: Method, choice: Choice | None, seed: int,
               pilot: _Search | None = None) -> _Search:  # fmt: skip
        """A search. Behind a pilot it goes on with the pilot's nodes, ledger and clock: they are one problem's."""
        config, prepared = self.config, prepared_for[method]
        ledger, nodes, problem = Ledger.empty(), dict[int, Branch](), prepared.problem
        started, before = time.perf_counter(), Phases()
        if pilot is not None:
            ledger, nodes, started, before = pilot.ledger, pilot.nodes, pilot.started, pilot.before

        def record(branch: Branch) -> None:
            nodes[branch.identity] = branch

        def answers(branches: Sequence[Branch]) -> list[str | None]:
            return read_answers(branches, method.rules.grouping, self.grader)[1]

        driver = Driver(method.program(root_branch(prepared.prompt, problem.problem)), answers)
        drawing = DrawContext(
            driver=driver,
            sampling=Sampling(temperature=method.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p),
            key=philox_key(seed, problem.id),
            limits=prepared.limits,
            max_steps=method.max_steps,
            prompt_tokens=len(prepared.prompt),
            ledger=ledger.policy,
            drawn=record,
        )
        scoring = None
        if method.uses_prm:
            assert self.scorer is not None, "stream() refuses a method that lacks its PRM"
            scoring = ScoreContext(driver=driver, opening=prepared.opening, ledger=ledger.prm, scored=record)
            drawing.score_of = partial(self.scorer.score_of, scoring)
        if pilot is not None:  # what it computed is known, and a step that it drew is no new one
            drawing.steps = pilot.drawing.steps
            if scoring is not None and pilot.scoring is not None:
                known = pilot.scoring
                scoring.steps, scoring.paths, scoring.scores = known.steps, known.paths, known.scores
        expected = self._expected(prepared_for)
        return _Search(problem, prepared_for, choice, method, driver, drawing, scoring, nodes, ledger, started, before, expected)

    def _abandon(self, search: _Search) -> None:
        self.policy.abandon(search.drawing)
        self.policy.retire(search.drawing)
        if self.scorer is not None and search.scoring is not None:
            self.scorer.abandon(search.scoring)
            self.scorer.retire(search.scoring)
        search.driver.close()

    def _result(self, search: _Search, seed: int) -> SearchResult:
        nodes = list(search.nodes.values())
        self._count(search, nodes)
        choice = search.choice or Choice(search.method)
        return conclude(search.problem, choice, seed, search.driver.result, nodes, search.ledger, self.grader)

    def _count(self, search: _Search, nodes: list[Branch]) -> None:
        """What of a search's costs follows from its tree, and its time."""
        ledger = search.ledger.policy
        parents = {node.parent.identity for node in nodes if node.parent is not None}
        ledger.tokens_unshared = sum(
            search.drawing.prompt_tokens + node.num_tokens for node in nodes if node.identity not in parents
        )
        accepted = {step.identity: len(step.tokens) for branch in search.driver.result for step in branch.steps}
        ledger.tokens_accepted = sum(accepted.values())
        self.policy.accounts.count(search.drawing)
        if self.scorer is not None and search.scoring is not None:
            self.scorer.count(search.scoring)
        search.ledger.seconds = time.perf_counter() - search.started


def _all_held(running: Sequence[_Search]) -> bool:
    """Whether none can go on by itself."""
    return all(search.held is not None for search in running)


def make_policy(config: EngineConfig, runner: ModelRunner, rule: StepRule) -> Policy:
    return Policy(runner, rule, max_rows=config.max_rows, graphs=make_graphs(runner, rule), speculate=config.speculate)


def make_graphs(runner: ModelRunner, rule: StepRule) -> DecodeGraphs | None:
    """Captured decode, where the device captures and the attention can be."""
    if runner.decoder.device.type != "cuda" or not isinstance(runner.backend, TritonTreeAttention):
        return None
    return DecodeGraphs(runner.decoder, runner.cache, runner.backend, after=rule.after, ends=rule.eos, last_state=CLOSED)


def make_scorer(runner: ModelRunner, checkpoint: Checkpoint, family: str | None) -> Scorer:
    """The scorer of a PRM checkpoint, its family recognised from config and tensors unless named."""
    name = recognise(checkpoint.config, checkpoint.tensor_names, family)
    spec = FAMILIES[name].bind(load_tokenizer(checkpoint.directory))
    decoder, read = runner.decoder, spec.readout
    width = decoder.spec.hidden_size
    if isinstance(read, TokenPair):
        pair = heads.PairHead.of(decoder, plus_id=read.plus, minus_id=read.minus)
        return Scorer(runner, spec, pair, head_flops=2 * width)
    if isinstance(read, TwoClassHead):
        two_class = heads.TwoClassHead.load(checkpoint, width, hidden=read.hidden, out=read.out, device=decoder.device)
        return Scorer(runner, spec, two_class, head_flops=2 * width * width + 2 * width)
    value = heads.ValueHead.load(checkpoint, width, linear=read.linear, device=decoder.device)
    return Scorer(runner, spec, value, head_flops=2 * width)


def as_problems(problems: str | Problem | Iterable[str | Problem]) -> list[Problem]:
    """Problems as given; plain texts become problems without a known answer. Ids must differ: they seed the draws."""
    given = [problems] if isinstance(problems, str | Problem) else list(problems)
    made = [p if isinstance(p, Problem) else Problem(id=f"problem-{i + 1}", problem=p, answer=None) for i, p in enumerate(given)]
    if len({problem.id for problem in made}) < len(made):
        raise EngineError("two problems have the same id; ids name results and seed the draws, so each must be its own")
    return made
