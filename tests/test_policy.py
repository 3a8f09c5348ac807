"""What a policy draws, against transformers and the definition of sampling."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tts_engine import policy as room
from tts_engine.attention import make_backend
from tts_engine.branch import root_branch
from tts_engine.draws import DrawContext, Limits
from tts_engine.ledger import PolicyLedger
from tts_engine.models.tokenizer import encode_prompt, load_tokenizer, token_bytes
from tts_engine.models.weights import load_decoder
from tts_engine.policy import Policy
from tts_engine.runner import ModelRunner
from tts_engine.sampling import Sampling, gumbel, philox_key, sample
from tts_engine.search import Cot, Driver, Majority
from tts_engine.search.requests import Expand
from tts_engine.steps import MarkedSteps
from tts_engine.testing import ChainDecoder, check_blocks, draw_all, random_policy_directory, tiny_spec

PROMPT = tuple(range(20, 37))  # 17 tokens: four blocks of 4 and one token


# Tokens, against transformers and the definition of sampling.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(transformers model, the directory it was saved to): steps of a dozen tokens, hardly an end."""
    directory = tmp_path_factory.mktemp("policy")
    return random_policy_directory(directory, seed=19, leans={"<|endoftext|>": -9.0, "\n\n": 2.5}), directory


def load(model, *, num_blocks: int = 200, max_rows: int = 64, **how) -> Policy:
    decoder = load_decoder(model[1], **how)
    runner = ModelRunner(decoder, make_backend("reference" if how else "per_branch"), num_blocks=num_blocks, block_size=4)
    for table in runner.cache.tables:
        table.fill_(torch.nan)  # whoever reads what was never written draws nonsense
    return Policy(runner, MarkedSteps(token_bytes(load_tokenizer(model[1])), [0], decoder.spec.vocab_size), max_rows=max_rows)


def logits_of(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model[0](torch.tensor([tokens])).logits[0]


def assert_drawn_from(model, nodes, temperature: float, seed: int = 0) -> int:
    """Every token of every node is argmax(logits / T + noise) by transformers' logits of its own path; the tokens checked."""
    key, checked = np.array([philox_key(seed, "draw_all")], np.uint32), 0
    for node in nodes:
        path = [token for step in node.path for token in step.tokens]
        start, count = len(path) - len(node.tokens), len(node.tokens)
        rows = logits_of(model, path)[start - 1 : -1] / temperature
        noise = gumbel(key.repeat(count, 0), np.full(count, node.identity, np.uint64), np.arange(start, len(path)), rows.shape[1])
        assert (rows + torch.from_numpy(noise)).argmax(-1).tolist() == list(node.tokens)
        checked += count
    return checked


def rounds(root, counts, policy=None):
    """A program: counts[0] children of the root, then counts[1] of each of them, ..., all KV forgotten before each round."""
    entries = [root]
    for count in counts:
        if policy is not None:
            policy.runner.tree.evict_all()
        entries = yield Expand([branch for branch in entries for _ in range(count) if not branch.finished])
    return entries


class Scripted(ChainDecoder):
    """Writes the tokens of `script` in their order, and notes what it is given to read at each position."""

    def __init__(self, spec, script, prompt_tokens):
        super().__init__(spec, {})
        self.script, self.prompt_tokens, self.read = script, prompt_tokens, {}

    def forward(self, token_ids, positions, *, read_at, **how):
        self.read.update(zip(positions.tolist(), token_ids.tolist(), strict=True))
        return positions[read_at]

    def logits(self, hidden):
        return torch.nn.functional.one_hot(torch.tensor(self.script)[hidden + 1 - self.prompt_tokens], self.spec.vocab_size).float()


def test_a_policy_reads_again_what_it_thought_though_its_template_would_leave_it_out(shared):
    directory = shared / "tokenizers" / "deepseek-r1-distill-qwen"
    if not directory.is_dir():
        pytest.skip(f"needs {directory}")
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = (shared / "chat_templates" / "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja").read_text("utf-8")
    thought, said = "First, x = 2.\n\nWait, no: x = 3.\n</think>\n\n", "So **x** is\n\n\\boxed{3}"
    script = tokenizer(thought + said, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    prompt = encode_prompt(tokenizer, "What is x?")
    decoder = Scripted(tiny_spec(vocab_size=len(tokenizer)), script, len(prompt))
    runner = ModelRunner(decoder, make_backend("reference"), num_blocks=64, block_size=4)
    policy = Policy(runner, MarkedSteps(token_bytes(tokenizer), [tokenizer.eos_token_id], len(tokenizer)), max_rows=4)
    drawn = draw_all(policy, rounds(root_branch(prompt), [1, 1, 1, 1, 1], policy), len(prompt))
    (branch,) = (node for node in drawn.nodes if node.finished)
    assert [step.text for step in branch.steps][0] == "First, x = 2.\n\n" and len(branch.steps) == 4
    assert [token for step in branch.path for token in step.tokens] == prompt + script
    assert [decoder.read[i] for i in range(len(prompt + script) - 1)] == (prompt + script)[:-1]

    turns = [{"role": "user", "content": "What is x?"}, {"role": "assistant", "content": branch.solution}]
    again = tokenizer.apply_chat_template(turns, tokenize=False)
    assert said in again and "x = 2" not in again


@pytest.mark.parametrize("how", [{}, {"deterministic": True}], ids=["per_branch", "deterministic"])
def test_greedy_text_equals_transformers_token_for_token(model, how):
    ref = model[0].generate(torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), do_sample=False, max_new_tokens=90,
                            eos_token_id=None, pad_token_id=1)[0, len(PROMPT) :].tolist()  # fmt: skip
    drawn = draw_all(load(model, **how), Cot().program(root_branch(PROMPT)), len(PROMPT), max_tokens=90)
    (branch,) = drawn.branches
    out = [token for step in branch.steps for token in step.tokens]
    assert len(branch.steps) > 2
    assert out == ref[: len(out)] and len(out) >= 64


def test_sampled_text_is_the_definition_applied_to_transformers_logits(model):
    drawn = draw_all(load(model), Majority(n=5).program(root_branch(PROMPT)), len(PROMPT), temperature=0.7, max_tokens=70)
    assert assert_drawn_from(model, drawn.nodes, 0.7) >= 5 * 60
    assert len({branch.solution for branch in drawn.branches}) == 5


def test_forks_of_forks_and_evictions_draw_from_the_logits_of_their_own_path(model):
    policy = load(model)
    drawn = draw_all(policy, rounds(root_branch(PROMPT), [3, 2, 3], policy), len(PROMPT), temperature=0.9, max_step_tokens=20)
    assert assert_drawn_from(model, drawn.nodes, 0.9) > 150
    kept = draw_all(load(model), rounds(root_branch(PROMPT), [3, 2, 3]), len(PROMPT), temperature=0.9, max_step_tokens=20)
    assert [(n.identity, n.tokens) for n in kept.nodes] == [(n.identity, n.tokens) for n in drawn.nodes]
    assert drawn.ledger.tokens_recomputed > 0 and kept.ledger.tokens_recomputed == 0


def test_children_take_their_first_token_from_one_row_of_their_parents_logits(model, monkeypatch):
    policy, heads, drawn_from = load(model), [], []
    whole = policy.runner.decoder.logits
    monkeypatch.setattr(policy.runner.decoder, "logits", lambda hidden: heads.append(len(hidden)) or whole(hidden))
    monkeypatch.setattr(
        room, "sample", lambda logits, rows, *rest: drawn_from.append((logits, rows)) or sample(logits, rows, *rest)
    )
    draw_all(policy, rounds(root_branch(PROMPT), [4]), len(PROMPT), temperature=0.7)
    assert heads[:2] == [1, 4]
    logits, rows = drawn_from[0]
    assert len(logits) == 1 and rows.tolist() == [0] * 4
    ref = logits_of(model, PROMPT)[-1]
    assert (logits[0] - ref).abs().max() <= 1e-4 * ref.abs().max()


@pytest.mark.parametrize("evicted", [False, True])
def test_a_path_is_walked_once_and_again_only_where_it_was_evicted(model, monkeypatch, evicted):
    policy, walked = load(model), []
    hold_path = policy.runner.hold_path
    monkeypatch.setattr(policy.runner, "hold_path", lambda steps: walked.append(len(steps)) or hold_path(steps))
    program = rounds(root_branch(PROMPT), [2, 1, 1], policy if evicted else None)
    assert len(draw_all(policy, program, len(PROMPT), temperature=0.9, max_step_tokens=20).branches) == 2
    assert walked == ([1, 2, 2, 3, 3] if evicted else [1])


@pytest.mark.parametrize("max_rows", [1, 3])
def test_few_rows_draw_the_same_as_many(model, max_rows):
    how = {"temperature": 0.8, "max_tokens": 40}
    ref, out = (draw_all(load(model, max_rows=rows, deterministic=True), Majority(n=5).program(root_branch(PROMPT)), 17, **how)
                for rows in (64, max_rows))  # fmt: skip
    assert [b.solution for b in out.branches] == [b.solution for b in ref.branches]


def test_preempted_draws_resume_behind_the_tokens_they_have(model, monkeypatch):
    how = {"temperature": 0.8, "max_tokens": 60, "max_step_tokens": 30}
    ref = draw_all(load(model, deterministic=True), Majority(n=4).program(root_branch(PROMPT)), 17, **how)
    small, sampled = load(model, num_blocks=5 + 30, deterministic=True), []
    monkeypatch.setattr(room, "sample", lambda *given: sampled.append(len(given[1])) or sample(*given))
    out = draw_all(small, Majority(n=4).program(root_branch(PROMPT)), 17, **how)
    assert small.preemptions > 0
    assert [[s.tokens for s in b.steps] for b in out.branches] == [[s.tokens for s in b.steps] for b in ref.branches]
    assert out.ledger.tokens_recomputed > 0
    assert out.ledger.tokens_generated == ref.ledger.tokens_generated == sum(sampled)


def test_a_forward_that_fails_leaves_nothing_held_and_the_draws_still_to_do(model, monkeypatch):
    ref = draw_all(load(model), Majority(n=3).program(root_branch(PROMPT)), 17, temperature=0.7, max_tokens=30)
    policy = load(model)
    forward, calls = policy.runner.forward, iter(range(1000))

    def failing(segments, read_at):
        if next(calls) % 3 == 0:
            raise KeyboardInterrupt
        return forward(segments, read_at)

    monkeypatch.setattr(policy.runner, "forward", failing)
    tick = policy.tick

    def patient():
        try:
            tick()
        except KeyboardInterrupt:
            counts = check_blocks(policy.runner.tree)
            assert policy._rows or counts.pinned == counts.filling == 0

    monkeypatch.setattr(policy, "tick", patient)
    out = draw_all(policy, Majority(n=3).program(root_branch(PROMPT)), 17, temperature=0.7, max_tokens=30)
    assert [b.solution for b in out.branches] == [b.solution for b in ref.branches]


def test_abandoning_a_search_gives_up_its_rows_and_no_others(model):
    policy = load(model)

    def context(name):
        driver = Driver(Majority(n=3).program(root_branch(PROMPT)))
        made = DrawContext(driver=driver, sampling=Sampling(temperature=0.7), key=philox_key(0, name), max_steps=9,
                           prompt_tokens=17, limits=Limits(max_step_tokens=20, max_tokens=40, max_positions=512),
                           ledger=PolicyLedger(), drawn=lambda branch: None)  # fmt: skip
        for ask in driver.asks():
            policy.submit(made, ask)
        return SimpleNamespace(driver=driver, context=made)

    staying, leaving = context("a"), context("b")
    for _ in range(4):
        policy.tick()
    policy.abandon(leaving.context)
    assert policy.num_open == 3
    while policy.busy:
        policy.tick()
        check_blocks(policy.runner.tree)
    assert staying.driver.done and not leaving.driver.done
    counts = policy.runner.tree.counts()
    assert counts.pinned == counts.filling == 0
