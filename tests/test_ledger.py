"""Costs of small searches, counted by hand; and the law that what was executed is what had to be and what was wasted."""

import itertools
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_engine import engine as engine_module
from tts_engine.attention import make_backend
from tts_engine.branch import Branch, child_identity, root_branch
from tts_engine.engine import Engine
from tts_engine.ledger import DistinctSteps, Held, Ledger, Phases, PolicyLedger, PRMLedger, Stopwatch, pairs
from tts_engine.policy import Policy
from tts_engine.prm.scorer import ScoreContext, Scorer
from tts_engine.prm.spec import PRMSpec, TwoClassHead
from tts_engine.results import Choice
from tts_engine.runner import ModelRunner
from tts_engine.search import Cot, Driver, Majority, make_method
from tts_engine.search.requests import Expand, Score
from tts_engine.steps import MarkedSteps
from tts_engine.tasks.problems import Problem
from tts_engine.testing import ChainDecoder, chain_policy, draw_all, random_policy_directory, random_prm_directory, tiny_spec

# tiny_spec: 3 layers of d 8, q 8, k and v 4 each, inner 10; 100 tokens
LAYER = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 10
PER_TOKEN, PER_PAIR, HEAD = 2 * 3 * LAYER, 4 * 8 * 3, 2 * 100 * 8
UNREAD = 2 * (LAYER - 2 * 8 * 4)  # what the last layer spares a token behind which nothing is drawn
READ_PAIR = PER_PAIR // 3

# Prompt "?" is tokens 0 to 4; then a step of four tokens with its blank line, then one of three with the end.
PIECES = [b"?", b"?", b"?", b"?", b"?", b"a", b"b", b"c", b"\n\n", b"d", b"e", b""]
PROMPT, END = (0, 1, 2, 3, 4), 11


def triangle(tokens: int) -> int:
    """(query, key) pairs of one causal path."""
    return tokens * (tokens + 1) // 2


def flops(ledger) -> tuple[int, int, int]:
    return ledger.linear_flops, ledger.attention_flops, ledger.head_flops


def drawn_at(*contexts: int) -> int:
    """Tokens that see so many, themselves among them, and behind each of which one is drawn."""
    return len(contexts) * (PER_TOKEN + HEAD) + sum(contexts) * PER_PAIR


def written_at(*contexts: int) -> int:
    """Such tokens, nothing drawn behind them."""
    return len(contexts) * (PER_TOKEN - UNREAD) + sum(contexts) * (PER_PAIR - READ_PAIR)


def wasted(ledger, **reasons: int) -> bool:
    return ledger.wasted_flops == {"padding": 0, "duplicates": 0, "rereading": 0, "recompute": 0, "speculation": 0} | reasons


def test_one_trajectory_costs_every_token_but_its_last_and_a_head_for_each_drawn():
    ledger = draw_all(chain_policy(PIECES, ends=[END]), Cot().program(root_branch(PROMPT)), 5).ledger
    assert (ledger.tokens_generated, ledger.tokens_computed, ledger.tokens_recomputed) == (7, 5 + 4 + 2, 0)
    unread = triangle(4) * PER_PAIR // 3  # of the prompt, all but its last token
    assert flops(ledger) == (11 * PER_TOKEN - 4 * UNREAD, triangle(11) * PER_PAIR - unread, 7 * HEAD)
    assert ledger.flops == 11 * PER_TOKEN + 66 * PER_PAIR + 7 * HEAD - 4 * UNREAD - unread
    assert ledger.ideal_flops == ledger.useful_flops == ledger.flops and wasted(ledger)


def test_trajectories_that_come_out_equal_cost_as_much_as_one():
    one, three = (draw_all(chain_policy(PIECES, ends=[END]), Majority(n=n).program(root_branch(PROMPT)), 5).ledger for n in (1, 3))
    assert (three.tokens_generated, three.tokens_computed) == (3 * 7, one.tokens_computed) == (21, 5 + 3 + 1 + 2)
    assert flops(three) == flops(one) and wasted(three)
    assert three.ideal_flops == three.useful_flops == written_at(1, 2, 3, 4) + drawn_at(5, 6, 7, 8, 9, 10, 11)


def test_trajectories_share_what_they_begin_with():
    out = draw_all(wandering_policy(60, 8), Majority(n=6).program(root_branch(PROMPT)), 5, temperature=1.0, max_steps=1,
                   max_step_tokens=6)  # fmt: skip
    steps = [node.tokens for node in out.nodes]
    begun = {tokens[:count] for tokens in steps for count in range(1, len(tokens))}
    assert 0 < len(begun) < len({(tokens, count) for tokens in set(steps) for count in range(1, len(tokens))})
    assert out.ledger.tokens_computed == 5 + len(begun)
    assert out.ledger.head_flops == (1 + len(begun)) * HEAD
    assert wasted(out.ledger) and out.ledger.found_flops == 0


def test_children_of_one_step_read_its_last_token_once():
    def program(root):
        (step,) = yield Expand([root])
        return (yield Expand([step] * 3))

    ledger = draw_all(chain_policy(PIECES, ends=[END]), program(root_branch(PROMPT)), 5).ledger
    assert ledger.tokens_computed == 5 + 4 + 2
    assert ledger.head_flops == (1 + 3 + 1 + 2) * HEAD
    assert wasted(ledger) and ledger.found_flops == 0


def test_forgotten_tokens_are_counted_again_and_named_recomputed():
    policy = chain_policy(PIECES, ends=[END])

    def program(root):
        (step,) = yield Expand([root])
        policy.runner.tree.evict_all()
        return (yield Expand([step]))

    ledger = draw_all(policy, program(root_branch(PROMPT)), 5).ledger
    assert ledger.tokens_computed == (5 + 3) + (5 + 4) + 2
    assert ledger.tokens_recomputed == 5 + 3  # the blank line had not been read before
    unread = triangle(4) + triangle(8)  # of the prompt all but the last, then all before the blank line
    assert ledger.attention_flops == (triangle(8) + triangle(11)) * PER_PAIR - unread * PER_PAIR // 3
    assert wasted(ledger, recompute=written_at(*range(1, 9))) and ledger.found_flops == 0


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_token_behind_which_more_is_drawn_later_is_read_again(forgotten):
    policy = chain_policy(PIECES, ends=[END])

    def program(root):
        for _ in range(2):
            (step,) = yield Expand([root])
            if forgotten:
                policy.runner.tree.evict_all()
        return [step]

    ledger = draw_all(policy, program(root_branch(PROMPT)), 5).ledger
    again, twins = drawn_at(5), drawn_at(6, 7, 8)
    reasons = {"recompute": again + written_at(1, 2, 3, 4)} if forgotten else {"rereading": again}
    assert wasted(ledger, duplicates=twins, **reasons) and ledger.found_flops == 0
    assert ledger.tokens_recomputed == 5 * forgotten


class Forking(ChainDecoder):
    """Behind token 0 come 1 and 2, as likely."""

    def logits(self, hidden):
        logits = super().logits(hidden)
        logits[hidden == 0, 1:3] = 1000.0
        return logits


def test_a_preempted_draw_pays_for_its_tokens_again_and_for_each_head_once():
    pieces = [b"?", b"a", b"b", *[b"c"] * 10, b""]
    policy = chain_policy(pieces, ends=[13], num_blocks=1 + 2 * 2, block_size=4)
    policy.runner.decoder = Forking(policy.runner.decoder.spec, policy.runner.decoder.follows | {1: 3})
    out = draw_all(policy, Majority(n=2).program(root_branch([0])), 1, temperature=1.0, seed=1)
    assert {node.tokens[0] for node in out.nodes} == {1, 2}
    ledger = out.ledger
    assert policy.preemptions == 1
    assert ledger.tokens_generated == 24
    assert ledger.head_flops == (24 - 1) * HEAD  # two first draws share the prompt's
    assert ledger.tokens_computed - ledger.tokens_recomputed == 1 + 2 * 11
    assert ledger.tokens_recomputed > 0
    recompute = written_at(*range(2, 2 + ledger.tokens_recomputed))
    assert wasted(ledger, recompute=recompute) and ledger.found_flops == 0


def test_what_another_search_computed_is_found():
    policy = chain_policy(PIECES, ends=[END])
    first, second = (draw_all(policy, Cot().program(root_branch(PROMPT)), 5).ledger for _ in range(2))
    assert first.found_flops == 0 and second.found_flops == written_at(1, 2, 3, 4)
    assert second.ideal_flops == first.ideal_flops and wasted(second)


def test_rows_beside_those_asked_for_are_padding():
    policy = chain_policy(PIECES, ends=[END])
    policy.runner.decoder.rows_beside = lambda count: -count % 4
    ledger = draw_all(policy, Cot().program(root_branch(PROMPT)), 5).ledger
    forwards, read = policy.runner.forwards, PER_TOKEN - (layers := PER_TOKEN - UNREAD) + HEAD
    assert forwards == 7
    assert wasted(ledger, padding=3 * layers + 3 * read + 6 * 3 * (layers + read))  # 5 tokens and one read, then ones and ones
    assert ledger.ideal_flops == ledger.useful_flops == ledger.flops - ledger.padding_flops


# --- the law ----------------------------------------------------------------------------------------------------------------


class Wandering(ChainDecoder):
    """Three letters, a blank line and an end come after anything, all as likely: siblings are often equal."""

    def logits(self, hidden):
        logits = torch.full((len(hidden), self.spec.vocab_size), -1000.0)
        logits[:, 5:10] = 0
        return logits


def wandering_policy(num_blocks: int, max_rows: int) -> Policy:
    pieces = [b"?"] * 5 + [b"a", b"b", b"c", b"\n\n", b""]
    runner = ModelRunner(Wandering(tiny_spec(), {}), make_backend("reference"), num_blocks=num_blocks, block_size=2)
    return Policy(runner, MarkedSteps(pieces, [9], runner.decoder.spec.vocab_size), max_rows=max_rows)


def wander(policy: Policy, rng: random.Random):
    """A program that goes on behind any step it has seen, whole trajectories now and then, and forgets what it read."""

    def program(root):
        open_ = [root]
        for _ in range(rng.randrange(1, 6)):
            entries = rng.choices(open_, k=rng.randrange(1, 7))
            open_ += [child for child in (yield Expand(entries, to_end=rng.random() < 0.3)) if not child.finished]
            if rng.random() < 0.3:
                policy.runner.tree.evict_all()
        return []

    return program(root_branch(PROMPT))


def ideal_by_hand(nodes) -> int:
    """Every distinct beginning of a step and every step with others behind it, straight from the definition."""
    paths = {tuple(step.tokens for step in node.path) for node in nodes}
    begun = {(*path[:-1], path[-1][:count]) for path in paths for count in range(1, len(path[-1]))}
    expanded = [path for path in paths if any(longer[:-1] == path for longer in paths)]
    ends = [sum(map(len, path)) for path in (*begun, *expanded)]
    return written_at(1, 2, 3, 4) + drawn_at(5, *ends)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), num_blocks=st.integers(20, 60), max_rows=st.integers(1, 8))
def test_what_a_policy_executed_had_to_be_or_was_wasted_for_a_reason(seed, num_blocks, max_rows):
    policy = wandering_policy(num_blocks, max_rows)
    out = draw_all(policy, wander(policy, random.Random(seed)), 5, temperature=1.0, max_step_tokens=4, max_tokens=12, max_steps=5,
                   seed=seed)  # fmt: skip
    ledger = out.ledger
    assert ledger.ideal_flops == ideal_by_hand(out.nodes)
    assert ledger.useful_flops == ledger.ideal_flops  # alone, so nothing was found
    assert (ledger.recompute_flops > 0) == (ledger.tokens_recomputed > 0)
    again = draw_all(policy, wander(policy, random.Random(seed + 1)), 5, temperature=1.0, max_step_tokens=4, max_tokens=12,
                     max_steps=5, seed=seed + 1)  # fmt: skip
    assert 0 < again.ledger.useful_flops <= again.ledger.ideal_flops == ideal_by_hand(again.nodes)


PRM_HEAD = 1000


def read_to_the_end(scorer, context):
    """Score what the context's driver asks until it is done, and count it."""
    while not context.driver.done:
        for ask in context.driver.asks():
            scorer.submit(context, ask)
        while scorer.num_open:
            scorer.tick()
    scorer.count(context)


def counting_scorer(num_blocks: int, read_at: int = -1) -> Scorer:
    """A step of a text is a token a letter and two for the marker; the opening is the problem's five tokens."""
    spec = PRMSpec(family="counted", opening=lambda problem: [7] * 5, read_at=read_at, readout=TwoClassHead(),
                   step=lambda text, first: [*(ord(letter) % 50 for letter in text), 51, 52])  # fmt: skip
    runner = ModelRunner(ChainDecoder(tiny_spec(), {}), make_backend("reference"), num_blocks=num_blocks, block_size=2)
    return Scorer(runner, spec, lambda hidden: torch.full((len(hidden),), 0.5), head_flops=PRM_HEAD)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), num_blocks=st.integers(14, 60), read_at=st.sampled_from([-1, -2]))
def test_what_a_prm_executed_had_to_be_or_was_wasted_for_a_reason(seed, num_blocks, read_at):
    rng, scorer = random.Random(seed), counting_scorer(num_blocks, read_at)
    paths = set[tuple[str, ...]]()

    def program(root):
        known = [root]
        for number in range(rng.randrange(1, 6)):
            parents = rng.choices(known, k=rng.randrange(1, 5))
            children = [Branch(parent, (1,), rng.choice("ab") * rng.randrange(1, 3), child_identity(parent.identity, (number,), i))
                        for i, parent in enumerate(parents)]  # fmt: skip
            scored = yield Score(children)
            paths.update(tuple(step.text for step in branch.steps) for branch in scored)
            known += [branch for branch in scored if branch.depth < 3]
            if rng.random() < 0.4:
                scorer.runner.tree.evict_all()
        return []

    driver = Driver(program(root_branch(())))
    context = ScoreContext(driver=driver, opening=scorer.spec.opening(""), ledger=PRMLedger(), scored=lambda step: None)
    read_to_the_end(scorer, context)
    ideal = written_at(*range(1, 6))
    for path in paths:
        end = 5 + sum(len(text) + 2 for text in path)
        ideal += written_at(*range(end - len(path[-1]) - 1, end + 1))
        ideal += UNREAD + (end + read_at + 1) * READ_PAIR + PRM_HEAD
    ledger = context.ledger
    assert ledger.ideal_flops == ideal == ledger.useful_flops
    assert ledger.duplicate_flops == 0 and ledger.padding_flops % PRM_HEAD == 0


@pytest.mark.parametrize(("width", "computed", "reread"), [(1, 750, 5_700), (4, 2_550, 22_800)])
def test_a_prm_reads_no_more_than_an_ideal_one_would(width, computed, reread):
    """A problem of 150 tokens and 12 steps of 50: the last of `width` siblings goes on."""
    scorer = counting_scorer(num_blocks=2_000)
    driver = Driver(twelve_rounds(width))
    context = ScoreContext(driver=driver, opening=[7] * 150, ledger=PRMLedger(), scored=lambda step: None)
    read_to_the_end(scorer, context)
    ledger = context.ledger
    assert (ledger.tokens_computed, ledger.tokens_reread, ledger.steps_scored) == (computed, reread, 12 * width)
    assert wasted(ledger, padding=12 * (32 - width) * PRM_HEAD)  # a head reads tiles of 32
    ideal = written_at(*range(1, 151))
    for end in range(200, 751, 50):
        ideal += width * (written_at(*range(end - 49, end + 1)) + UNREAD + end * READ_PAIR + PRM_HEAD)
    assert ledger.ideal_flops == ledger.useful_flops == ideal
    assert ledger.kv_distinct_bytes == (700 + 50 * width) * scorer.runner.token_bytes
    assert ledger.kv_logical_bytes == 750 * width * scorer.runner.token_bytes


def twelve_rounds(width: int):
    best = root_branch(())
    for depth in range(12):
        children = [Branch(best, (1,), chr(65 + sibling) * 48, child_identity(best.identity, (depth,), sibling))
                    for sibling in range(width)]  # fmt: skip
        best = (yield Score(children))[-1]
    return [best]


# --- whole searches ---------------------------------------------------------------------------------------------------------

PROBLEMS = [Problem(id=f"p{i}", problem=text, answer=None) for i, text in enumerate(["a=3;b=a+4;b?", "1+1?", "x=9;y=x*2;y?"])]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    random_policy_directory(top / "policy", seed=23, leans={"<|endoftext|>": 0.0})
    random_prm_directory(top / "prm", "qwen2.5-math-prm", seed=2)
    with Engine.from_pretrained(top / "policy", top / "prm", block_size=4, max_step_tokens=16, max_tokens=60,
                                kv_bytes=4 << 20) as made:  # fmt: skip
        yield made


@pytest.mark.parametrize("name", ["best_of_n", "beam", "dvts", "rebase"])
def test_a_search_alone_wastes_nothing_but_what_its_method_draws_twice(engine, name):
    engine.forget()
    (result,) = engine.search(PROBLEMS[0], make_method(name, n=8, max_steps=5), seed=3)
    policy, prm = result.ledger.policy, result.ledger.prm
    paths = {tuple(step.tokens for step in node.path) for node in result.nodes}
    assert (policy.duplicate_flops > 0) == (len(paths) < len(result.nodes))
    assert wasted(policy, duplicates=policy.duplicate_flops) and wasted(prm, padding=prm.padding_flops)
    assert policy.found_flops == prm.found_flops == 0 and 0 < prm.padding_flops < prm.flops / 10
    share = (policy.ideal_flops + prm.ideal_flops) / result.ledger.flops
    assert result.ledger.useful == pytest.approx(share)
    assert share + sum(result.ledger.wasted.values()) == pytest.approx(1)
    on_voted = {step.identity: len(step.tokens) for branch in result.branches for step in branch.steps}
    assert policy.tokens_accepted == sum(on_voted.values()) <= policy.tokens_generated
    assert 0 < policy.kv_distinct_bytes < policy.kv_logical_bytes and 0 < prm.kv_distinct_bytes < prm.kv_logical_bytes


class PilotFirst:
    """A chooser that looks at a narrow search, in a lane of its own, and then has a beam search done."""

    name = "pilot-first"
    methods = (make_method("dvts", n=2, width=2, max_steps=5), make_method("beam", n=4, max_steps=5))

    def pilot(self, problem):
        return self.methods[0]

    def choose(self, problem, pilot):
        assert pilot.ledger.policy.found_flops == pilot.ledger.prm.found_flops == 0
        self.drawn = len(pilot.nodes)
        return Choice(self.methods[1])

    def describe(self):
        return {}


def test_a_pilot_and_what_was_chosen_by_it_have_one_ledger(engine):
    engine.forget()
    chooser = PilotFirst()
    (result,) = engine.search(PROBLEMS[0], chooser, seed=3)
    policy, prm = result.ledger.policy, result.ledger.prm
    assert 0 < chooser.drawn < len(result.nodes) and policy.tokens_generated == sum(len(node.tokens) for node in result.nodes)
    assert policy.found_flops == prm.found_flops == 0 and 0 < policy.rereading_flops < policy.flops / 10  # the prompt's last token
    assert prm.steps_scored == len(result.nodes)


def test_phases_add_up_to_the_time_that_passed(engine, monkeypatch):
    """By a clock that goes on by one whenever it is asked."""
    clock = itertools.count()
    monkeypatch.setattr(engine_module, "Stopwatch", lambda: Stopwatch(lambda: next(clock)))
    results = list(engine.stream(PROBLEMS, make_method("beam", n=4, max_steps=3)))
    total = Phases()
    for result in results:
        total.add(result.ledger.phases)
    assert total.policy > 3 and total.prm > 3 and total.rest > 3 and total.grading == len(results)
    passed = next(clock) - 1  # since the first time it was asked
    assert total.policy + total.prm + total.rest + total.grading == pytest.approx(passed - len(results))  # between results


def test_a_turn_is_shared_by_those_who_run():
    watch = Stopwatch(iter([10.0, 11.0, 15.0, 18.0]).__next__)
    watch.share("policy", 1)
    before = watch.since(Phases())
    watch.share("prm", 2)
    watch.share("rest", 0)
    assert before == Phases(policy=1.0)
    assert watch.since(before) == Phases(prm=2.0, rest=3.0)


# --- the tree of distinct steps ---------------------------------------------------------------------------------------------


def tree(*paths):
    """A draw for every path of step lengths: tree((3,), (3, 4)) is a step of 3 and one of 4 behind it. All tokens are alike."""
    steps, by_path = DistinctSteps(10), {(): 0}
    for number, path in enumerate(paths):
        by_path[path] = number + 1
        steps.add(number + 1, by_path[path[:-1]], (0,) * path[-1])
    return steps


@pytest.mark.parametrize(
    ("steps", "held"),
    [
        (tree(), Held(distinct=10, logical=10)),
        (tree((5,)), Held(distinct=15, logical=15)),
        (tree((5,), (6,)), Held(distinct=21, logical=31)),
        (tree((5,), (6,), (5, 1), (5, 2)), Held(distinct=21, logical=31)),  # the first round held more
        (tree((5,), (6,), (5, 4), (5, 7)), Held(distinct=26, logical=41)),
        (tree((5,), (6,), (5, 4), (6, 7)), Held(distinct=32, logical=42)),
        (tree((1,), (1, 2), (1, 2, 3)), Held(distinct=16, logical=16)),
        (tree((5,), (5,), (5, 2), (5, 2), (5, 3)), Held(distinct=20, logical=52)),  # equal siblings are held once
    ],
)
def test_the_widest_round_of_a_tree(steps, held):
    assert steps.widest_round() == held


@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 7), (5, 1), (123, 4), (9, 0)])
def test_pairs_are_those_of_a_causal_mask(start, count):
    assert pairs(start, count) == sum(k <= q for q in range(start, start + count) for k in range(start + count))


# --- records ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("adopted", "wasted", "rate"), [(0, 0, None), (3, 1, 0.75), (0, 5, 0.0)])
def test_the_hit_rate_is_the_share_of_what_was_drawn_ahead_that_was_asked_for(adopted, wasted, rate):
    ledger = Ledger(policy=PolicyLedger(tokens_adopted=adopted, tokens_wasted=wasted), prm=PRMLedger())
    assert ledger.policy.hit_rate == ledger.as_dict()["policy"]["hit_rate"] == rate


def test_ledgers_add_up_and_go_to_json_and_back():
    one = Ledger(policy=PolicyLedger(tokens_computed=3, linear_flops=10, attention_flops=4, head_flops=2, tokens_generated=2,
                                     duplicate_flops=4, ideal_flops=12),
                 prm=PRMLedger(tokens_computed=5, linear_flops=100, padding_flops=20, steps_scored=1, tokens_reread=9,
                               ideal_flops=101), seconds=0.5, phases=Phases(prm=0.25))  # fmt: skip
    total = Ledger.empty()
    total.add(one)
    total.add(one)
    assert (total.flops, one.flops, total.seconds, total.phases.prm) == (272, 136, 1.0, 0.5)
    assert total.useful == pytest.approx(112 / 136)
    assert total.wasted == pytest.approx({"padding": 20 / 136, "duplicates": 4 / 136, "rereading": 0, "recompute": 0,
                                         "speculation": 0})  # fmt: skip
    assert (one.policy.found_flops, one.prm.found_flops) == (0, 1)
    record = json.loads(json.dumps(total.as_dict()))
    assert record["policy"]["flops"] == 32 and record["prm"]["flops"] == 240 and record["prm"]["useful_flops"] == 200
    assert record["policy"]["tokens_computed"] == 6 and record["prm"]["tokens_reread"] == 18
    assert Ledger.from_dict(record) == total


OLD_PART = {"tokens_computed": 3, "tokens_recomputed": 1, "linear_flops": 10, "attention_flops": 4, "head_flops": 2, "flops": 16}
OLD = {"policy": OLD_PART | {"tokens_generated": 2, "tokens_unshared": 9},
       "prm": OLD_PART | {"steps_scored": 1, "tokens_reread": 7}, "seconds": 0.5}  # fmt: skip


def test_a_record_of_an_earlier_version_is_read_and_claims_nothing_it_does_not_know():
    old = Ledger.from_dict(OLD)
    assert (old.flops, old.seconds, old.policy.tokens_unshared) == (32, 0.5, 9) and old.useful is None
    new = Ledger(policy=PolicyLedger(linear_flops=10, ideal_flops=10), prm=PRMLedger())
    for order in ((old, new, new), (new, old, new), (new, new, old)):
        total = Ledger.empty()
        for one in order:
            total.add(one)
        assert total.flops == 52 and total.useful is None
    assert new.useful == 1.0


@pytest.mark.parametrize("name", ["tokens_computed", "tokens_recomputed", "linear_flops", "attention_flops", "head_flops"])
def test_a_record_without_what_every_version_wrote_is_none(name):
    broken = OLD | {"prm": {key: value for key, value in OLD["prm"].items() if key != name}}
    with pytest.raises(KeyError, match=name):
        Ledger.from_dict(broken)
