"""Scores read step by step against one full forward of transformers' base model and the head written out; and their costs."""

import re

import pytest
import torch
from safetensors.torch import load_file

from tts_engine.attention import make_backend
from tts_engine.branch import Branch, Finish, root_branch
from tts_engine.engine import Engine, make_scorer
from tts_engine.errors import EngineError, ModelError, OutOfBlocks
from tts_engine.kv.tree import blocks_needed
from tts_engine.ledger import PRMLedger
from tts_engine.models.weights import Checkpoint, load_decoder
from tts_engine.prm import scorer as scorer_room
from tts_engine.prm.families import FAMILIES
from tts_engine.prm.scorer import ScoreContext, Scorer
from tts_engine.prm.spec import PRMSpec, TwoClassHead
from tts_engine.runner import ModelRunner
from tts_engine.search import Driver
from tts_engine.search.requests import Score
from tts_engine.testing import check_blocks, random_prm_directory

PROBLEM = "a=3;b=a+4;b?"
STEPS = ["a=3", "so b=3+4\n\n", " ", "b=7", "\\boxed{7}\n\n"]


@pytest.fixture(scope="module", params=FAMILIES)
def prm(request, tmp_path_factory):
    """(kind, transformers model, directory)."""
    directory = tmp_path_factory.mktemp("prm")
    return request.param, random_prm_directory(directory, request.param, seed=4), directory


def load(prm, *, num_blocks: int = 200, backend: str = "per_branch", deterministic: bool = False) -> Scorer:
    decoder = load_decoder(prm[2], deterministic=deterministic)
    runner = ModelRunner(decoder, make_backend(backend), num_blocks=num_blocks, block_size=4)
    for table in runner.cache.tables:
        table.fill_(torch.nan)  # a score that touches what was never written is no number
    return make_scorer(runner, Checkpoint(prm[2]), None)


def grown(branch: Branch, texts) -> Branch:
    for text in texts:
        branch = Branch(branch, (1,), text, hash((branch.identity, text)) % 2**64)
    return branch


def full_forward(prm, spec: PRMSpec, texts, problem: str = PROBLEM) -> list[float]:
    """What transformers says: its final hidden states of the whole path at once, and the head."""
    kind, model, directory = prm
    ids, positions = spec.render(problem, texts)
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, positions]
    tensors = load_file(directory / "model.safetensors")
    if kind in ("math-shepherd", "rlhflow"):
        plus, minus = spec.readout.plus, spec.readout.minus
        return (hidden @ tensors["lm_head.weight"][[plus, minus]].T).softmax(-1)[:, 0].tolist()
    if kind in ("skywork", "value-head"):
        return torch.sigmoid(hidden @ tensors["v_head.summary.weight"][0] + tensors["v_head.summary.bias"]).tolist()
    inner = torch.relu(hidden @ tensors["score.0.weight"].T + tensors["score.0.bias"])
    return (inner @ tensors["score.2.weight"].T + tensors["score.2.bias"]).softmax(-1)[:, 1].tolist()


class Bench:
    """Searches that only score, over one scorer."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.told = scorer, []

    def context(self, problem: str = PROBLEM) -> ScoreContext:
        opening = self.scorer.spec.opening(problem)
        return ScoreContext(driver=None, opening=opening, ledger=PRMLedger(), scored=self.told.append)

    def ask(self, context: ScoreContext, branches) -> None:
        def program():
            return (yield Score(list(branches)))

        context.driver = Driver(program())
        for ask in context.driver.asks():
            self.scorer.submit(context, ask)

    def run(self) -> None:
        while self.scorer.num_open:
            self.scorer.tick()
            counts = check_blocks(self.scorer.runner.tree)
            assert counts.pinned == counts.filling == 0

    def score(self, context: ScoreContext, branches) -> list[Branch]:
        self.ask(context, branches)
        self.run()
        context.driver.asks()  # raises why it failed, if it did
        return context.driver.result


def near(scores) -> object:
    return pytest.approx(scores, abs=1e-5, rel=0)


def test_a_prm_given_as_the_policy_is_refused(prm):
    for prm_given in (None, prm[2]):
        with pytest.raises(ModelError, match="is a reward model .* and cannot write: give it as the PRM"):
            Engine.from_pretrained(prm[2], prm_given)


def test_the_tiny_models_tell_steps_apart(prm):
    ref = full_forward(prm, load(prm).spec, STEPS)
    assert max(ref) - min(ref) > 0.05


@pytest.mark.parametrize("backend", ["reference", "per_branch"])
def test_a_path_in_one_go_cold_and_warm_equals_the_full_forward(prm, backend):
    bench = Bench(load(prm, backend=backend))
    ref = full_forward(prm, bench.scorer.spec, STEPS)
    for _ in range(2):  # the second search finds all of it read
        (out,) = bench.score(bench.context(), [grown(root_branch(()), STEPS)])
        assert list(out.scores) == near(ref)
        assert out.solution == "".join(STEPS)


@pytest.mark.parametrize("forget", [False, True], ids=["warm", "evicted"])
def test_a_path_step_by_step_equals_the_full_forward(prm, forget):
    bench = Bench(load(prm))
    context, branch = bench.context(), root_branch(())
    for text in STEPS:
        if forget:
            bench.scorer.runner.tree.evict_all()
        (branch,) = bench.score(context, [grown(branch, [text])])
    assert list(branch.scores) == near(full_forward(prm, bench.scorer.spec, STEPS))
    assert (context.ledger.tokens_recomputed > 0) == forget


def test_branches_of_several_problems_in_one_batch_each_equal_their_full_forward(prm):
    bench = Bench(load(prm))
    problems = [PROBLEM, "1+1?", "x=9;x%2?"]
    paths = [[*STEPS[:2], "c=1"], STEPS, ["no"], STEPS[:3]]
    contexts = [bench.context(problem) for problem in problems]
    for context in contexts:
        bench.ask(context, [grown(root_branch(()), path) for path in paths])
    bench.run()
    for context, problem in zip(contexts, problems, strict=True):
        for branch, path in zip(context.driver.result, paths, strict=True):
            assert list(branch.scores) == near(full_forward(prm, bench.scorer.spec, path, problem))


def test_a_pool_that_holds_one_path_scores_many_and_reads_again_what_it_forgot(prm):
    paths = [[*STEPS[:4], ending] for ending in ("x", "y")] + [["other", *STEPS[1:]], STEPS]
    spec = load(prm).spec
    pieces = [spec.opening(PROBLEM), *(spec.step(text, number == 0) for number, text in enumerate(STEPS))]
    blocks = sum(blocks_needed(len(ids), 4) for ids in pieces)
    bench = Bench(load(prm, num_blocks=blocks + 1))
    context = bench.context()
    early = bench.score(context, [grown(root_branch(()), path[:4]) for path in paths])
    out = bench.score(context, [grown(branch, path[4:]) for branch, path in zip(early, paths, strict=True)])
    for branch, path in zip(out, paths, strict=True):
        assert list(branch.scores) == near(full_forward(prm, spec, path))
    assert context.ledger.tokens_recomputed > 0


def test_deterministic_scores_have_the_same_bits_however_they_are_read(prm):
    alone = Bench(load(prm, backend="reference", deterministic=True))
    (ref,) = alone.score(alone.context(), [grown(root_branch(()), STEPS)])
    bench = Bench(load(prm, backend="reference", deterministic=True))
    context, branch = bench.context(), root_branch(())
    for i, text in enumerate(STEPS):
        bench.ask(bench.context("2+2?"), [grown(root_branch(()), STEPS[i:])])
        (branch,) = bench.score(context, [grown(branch, [text])])
        if i == 2:
            bench.scorer.runner.tree.evict_all()
    assert branch.scores == ref.scores


def test_a_scored_step_keeps_its_score_and_is_not_read_again(prm):
    bench = Bench(load(prm))
    context = bench.context()
    (first,) = bench.score(context, [grown(root_branch(()), STEPS[:2])])
    computed = context.ledger.tokens_computed
    assert bench.score(context, [first]) == [first]
    (longer,) = bench.score(context, [grown(first, ["b=7"])])
    assert longer.parent is first
    assert context.ledger.tokens_computed == computed + len(bench.scorer.spec.step("b=7", False))
    assert [step.text for step in bench.told] == [*STEPS[:2], "b=7"]


def test_siblings_with_equal_text_are_read_once_and_scored_each(prm):
    bench = Bench(load(prm))
    context, root = bench.context(), root_branch(())
    twins = [grown(root, ["same"]) for _ in range(3)]
    out = bench.score(context, twins)
    spec = bench.scorer.spec
    assert len({branch.score for branch in out}) == 1 and len({id(branch) for branch in out}) == 3
    assert context.ledger.tokens_computed == len(context.opening) + len(spec.step("same", True))
    assert context.ledger.steps_scored == 3


def test_what_was_offered_is_read_with_others_and_answered_without_another_forward(prm):
    bench = Bench(load(prm))
    context, root = bench.context(), root_branch(())
    early, late = grown(root, STEPS[:1]), grown(root, ["late"])
    bench.scorer.offer(context, early)
    bench.scorer.offer(context, grown(root, STEPS[:1]))
    assert bench.scorer.num_open == context.ledger.tokens_computed == 0
    bench.scorer.tick()
    read = context.ledger.tokens_computed
    assert read == len(context.opening) + len(bench.scorer.spec.step(STEPS[0], True)) and not bench.told
    bench.ask(context, [early])
    assert bench.scorer.num_open == 0 and context.driver.done
    assert list(context.driver.result[0].scores) == near(full_forward(prm, bench.scorer.spec, STEPS[:1]))
    assert context.ledger.tokens_computed == read and bench.told == context.driver.result
    bench.scorer.offer(context, late)
    bench.score(context, [late, early])
    assert context.ledger.tokens_computed == read + len(bench.scorer.spec.step("late", True))
    assert not bench.scorer._offered and not context.readings


def test_the_parts_of_an_offered_path_are_read_with_it(prm):
    bench = Bench(load(prm))
    context, branch = bench.context(), root_branch(())
    for text in STEPS:
        branch = grown(branch, [text])
        bench.scorer.offer(context, branch)
    (out,) = bench.score(context, [branch])
    assert list(out.scores) == near(full_forward(prm, bench.scorer.spec, STEPS))
    assert context.ledger.tokens_computed == len(bench.scorer.spec.render(PROBLEM, STEPS)[0])
    assert not bench.scorer._offered and not context.readings


def test_siblings_with_equal_text_are_read_once_though_one_comes_later(prm):
    bench = Bench(load(prm))
    context, root = bench.context(), root_branch(())
    (first,) = bench.score(context, [grown(root, ["same"])])
    read = context.ledger.tokens_computed
    (twin,) = bench.score(context, [Branch(root, (2,), "same", 77)])
    assert twin.score == first.score and twin.identity == 77 and context.ledger.tokens_computed == read
    assert context.ledger.steps_scored == 2


def test_a_batch_is_worth_a_tick_whoever_waits_and_those_waited_for_come_first(prm, monkeypatch):
    monkeypatch.setattr(scorer_room, "MAX_TOKENS", 1)
    bench = Bench(load(prm))
    step = len(bench.scorer.spec.step("a", True))
    monkeypatch.setattr(scorer_room, "BATCH_TOKENS", 3 * step)
    context, root = bench.context(), root_branch(())
    for text, worth in (("a", False), ("b", False), ("a", False), ("c", True)):
        bench.scorer.offer(context, grown(root, [text]))
        assert bench.scorer.worth_a_tick == worth
    bench.ask(context, [grown(root, ["c"])])
    bench.scorer.tick()
    assert context.driver.done and len(context.scores) == 1 and not bench.scorer.worth_a_tick
    bench.scorer.abandon(context)
    assert not bench.scorer._offered and not context.readings


def test_finish_and_lane_of_a_branch_survive_its_scoring(prm):
    bench = Bench(load(prm))
    root = root_branch((5, 6))
    branch = Branch(root, (7, 8), "b=7", 99, (0, 1), 3, Finish.EOS)
    (out,) = bench.score(bench.context(), [branch])
    assert (out.parent, out.tokens, out.identity, out.lane, out.draw, out.finish) == (root, (7, 8), 99, (0, 1), 3, Finish.EOS)


def test_an_abandoned_search_is_not_read(prm):
    bench = Bench(load(prm))
    staying, leaving = bench.context(), bench.context("2+2?")
    bench.ask(leaving, [grown(root_branch(()), STEPS)])
    bench.ask(staying, [grown(root_branch(()), STEPS)])
    bench.scorer.abandon(leaving)
    bench.run()
    assert staying.driver.done and leaving.ledger.tokens_computed == 0


def test_a_path_that_can_never_fit_is_refused_with_the_numbers(prm):
    bench = Bench(load(prm, num_blocks=5))
    with pytest.raises(OutOfBlocks, match=r"needs \d+ KV blocks of 4 tokens to read one branch and has 5 in all; raise kv_bytes"):
        bench.score(bench.context(), [grown(root_branch(()), STEPS)])
    assert check_blocks(bench.scorer.runner.tree).pinned == 0


@pytest.mark.parametrize("extra", [0, 1])
def test_a_path_longer_than_the_model_has_positions_is_refused_before_it_is_read(prm, extra):
    bench = Bench(load(prm))
    spec, positions = bench.scorer.spec, bench.scorer.runner.decoder.spec.max_positions
    spare = positions - len(spec.render(PROBLEM, [*STEPS, "a"])[0])
    path = grown(root_branch((), PROBLEM), [*STEPS, "a" * (1 + spare + extra)])
    assert len(spec.render(PROBLEM, [step.text for step in path.steps])[0]) == positions + extra
    context = bench.context()
    if not extra:
        assert None not in bench.score(context, [path])[0].scores
        return
    said = f"a solution to '{PROBLEM}' has come to {positions + 1} tokens as the PRM reads it, and the PRM has {positions} "
    with pytest.raises(EngineError, match=re.escape(said)):
        bench.ask(context, [grown(root_branch((), PROBLEM), STEPS), path])
    assert bench.scorer.num_open == context.ledger.tokens_computed == 0


def test_a_token_that_the_model_does_not_know_is_refused_before_it_is_read(tmp_path):
    directory = tmp_path / "qwen"
    random_prm_directory(directory, "qwen2.5-math-prm", vocab_size=40)  # of the tokenizer's 64
    bench = Bench(load(("qwen2.5-math-prm", None, directory)))
    with pytest.raises(EngineError, match=r"writes token 59 and its model knows 40: they do not belong together"):
        bench.ask(bench.context("1"), [grown(root_branch(()), ["1+1"])])  # 59 is the line end
    assert bench.scorer.num_open == 0


def test_a_score_that_is_no_number_is_an_error(prm):
    bench = Bench(load(prm))
    bench.scorer.head = lambda hidden: torch.full((len(hidden),), torch.nan)
    with pytest.raises(EngineError, match="no probability"):
        bench.score(bench.context(), [grown(root_branch(()), STEPS)])
    assert check_blocks(bench.scorer.runner.tree).pinned == 0


def test_a_score_that_is_no_number_ends_its_own_search_and_what_was_read_beside_it_is_answered(prm):
    bench, root = Bench(load(prm)), root_branch(())
    head, one, other = bench.scorer.head, bench.context(), bench.context("1+1?")
    ref = Bench(load(prm)).score(bench.context("1+1?"), [grown(root, STEPS)])
    bench.ask(one, [grown(root, [text]) for text in "ab"])
    bench.ask(other, [grown(root, STEPS)])
    bench.scorer.head = lambda hidden: head(hidden).index_fill(0, torch.tensor([1]), torch.inf)
    bench.run()
    assert bench.scorer.num_open == 0 and not one.driver.done and not one.readings
    with pytest.raises(EngineError, match="the PRM gave inf for a step, which is no probability"):
        one.driver.asks()
    assert other.driver.result[0].scores == near(ref[0].scores)


def test_paths_that_are_too_much_for_the_memory_are_read_in_smaller_batches(prm, monkeypatch):
    bench, root, sizes = Bench(load(prm)), root_branch(()), []
    ref = Bench(load(prm)).score(bench.context(), [grown(root, [text, "7."]) for text in "abcdefgh"])
    forward, most = bench.scorer.runner.forward, len(bench.scorer.spec.render(PROBLEM, ["a" * 9, "7."])[0])

    def limited(segments, read_at):
        sizes.append(len(segments.token_ids))
        if sizes[-1] > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes")
        return forward(segments, read_at)

    monkeypatch.setattr(bench.scorer.runner, "forward", limited)
    context = bench.context()
    out = bench.score(context, [grown(root, [text, "7."]) for text in "abcdefgh"])
    assert [branch.scores for branch in out] == [near(branch.scores) for branch in ref]
    assert max(sizes) > most >= sizes[-1] and context.ledger.tokens_recomputed == context.ledger.rereading_flops == 0
    one, other = bench.context("9" * 40), bench.context()
    bench.ask(one, [grown(root, ["a" * most])])
    bench.ask(other, [grown(root, ["z"])])
    bench.run()
    with pytest.raises(EngineError, match="memory does not suffice for the PRM to read a single branch"):
        one.driver.asks()
    assert other.driver.done


def test_a_forward_that_fails_leaves_nothing_held(prm, monkeypatch):
    bench = Bench(load(prm))

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.scorer.runner, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        bench.score(bench.context(), [grown(root_branch(()), STEPS)])
    assert check_blocks(bench.scorer.runner.tree).pinned == 0


# The hand count of mission G: a problem of 150 tokens, 12 steps of 50 with their marker.


@pytest.mark.parametrize(("width", "computed", "reread"), [(1, 750, 5_700), (4, 2_550, 22_800)])
def test_tokens_read_are_those_counted_by_hand(tmp_path, width, computed, reread):
    random_prm_directory(tmp_path, "qwen2.5-math-prm", num_hidden_layers=1, max_position_embeddings=1024)
    runner = ModelRunner(load_decoder(tmp_path), make_backend("per_branch"), num_blocks=400, block_size=16)
    spec = PRMSpec(family="counted", opening=lambda problem: [7] * 150, read_at=-1, readout=TwoClassHead(),
                   step=lambda text, first: [*([int(text)] * 49), 2])  # fmt: skip
    bench = Bench(Scorer(runner, spec, lambda hidden: torch.full((len(hidden),), 0.5), head_flops=1000))
    context, best = bench.context(), root_branch(())
    for depth in range(12):
        children = bench.score(context, [grown(best, [str(10 + sibling)]) for sibling in range(width)])
        best = children[depth % width]
    ledger = context.ledger
    assert (ledger.tokens_computed, ledger.tokens_reread) == (computed, reread)
    assert (ledger.steps_scored, ledger.tokens_recomputed) == (12 * width, 0)
    assert ledger.head_flops == 1000 * 12 * width
    read = width * sum(range(200, 751, 50))  # in the only layer, which is the last, each step's last token alone attends
    assert ledger.attention_flops == read * 4 * 32
