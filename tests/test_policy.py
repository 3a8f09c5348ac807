"""Where a step ends, and what a policy draws against transformers and the definition of sampling."""

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tts_engine import policy as room
from tts_engine.attention import make_backend
from tts_engine.branch import Finish, root_branch
from tts_engine.engine import Engine, EngineConfig
from tts_engine.errors import EngineError
from tts_engine.ledger import PolicyLedger
from tts_engine.models.tokenizer import encode_prompt, load_tokenizer, token_bytes
from tts_engine.models.weights import load_decoder
from tts_engine.policy import CLOSED, NO_TEXT, STEP_MARKERS, DrawContext, Limits, Policy, StepRule
from tts_engine.runner import ModelRunner
from tts_engine.sampling import Sampling, gumbel, philox_key, sample
from tts_engine.search import Cot, Driver, Majority
from tts_engine.search.requests import Expand
from tts_engine.testing import ChainDecoder, chain_policy, check_blocks, draw_all, random_policy_directory, tiny_spec

PROMPT = tuple(range(20, 37))  # 17 tokens: four blocks of 4 and one token


def written(pieces: list[bytes], ends: tuple[int, ...] = (), mode: str = "blank-line", **limits: int):
    """(text, finish) of each step that a policy writes after piece 0, until it ends."""
    policy = chain_policy([b"?", *pieces], ends=ends)
    policy.rule = StepRule([b"?", *pieces], ends, len(policy.rule.eos), mode)
    drawn = draw_all(policy, Cot(max_steps=limits.pop("max_steps", 8)).program(root_branch([0])), 1, max_steps=8, **limits)
    return [(step.text, step.finish) for step in drawn.branches[0].steps]


# The step rule.


@pytest.mark.parametrize(
    "pieces",
    [[b"a", b"\n\n", b"b", b"$"], [b"a\n\nb", b"$"], [b"a\n", b"\nb", b"$"], [b"a", b"\n", b"\n", b"b", b"$"],
     [b"a.\n\n", b"b", b"$"], [b"a", b"\n", b"\n\n", b"b", b"$"], [b"\n\n", b"a", b"\n\n", b"b", b"$"], [b"\n\na\n\n", b"b", b"$"]],
    ids=["a token of its own", "inside a token", "across two", "across three", "at a token's end", "three line ends",
         "after leading line ends", "after leading line ends in one token"],
)  # fmt: skip
def test_a_step_ends_with_the_token_that_completes_a_blank_line(pieces):
    steps = written(pieces, ends=(len(pieces),))
    assert len(steps) == 2
    assert steps[0][1] is None and steps[1][1] is Finish.EOS
    assert "".join(text for text, _ in steps) == b"".join(pieces).decode()


@pytest.mark.parametrize("pieces", [[b"\n\n", b"\n", b" \n\n", b"a"], [b"\n", b"\n", b"a"], [b"\n\n\n a"]])
def test_leading_line_ends_close_no_step(pieces):
    assert written([*pieces, b"$"], ends=(len(pieces) + 1,)) == [((b"".join(pieces) + b"$").decode(), Finish.EOS)]


def test_a_silent_token_between_two_line_ends_does_not_part_them():
    assert written([b"a\n", b"", b"\n", b"b", b"$"], ends=(5,)) == [("a\n\n", None), ("b$", Finish.EOS)]


def test_a_space_between_two_line_ends_makes_no_blank_line():
    assert written([b"a\n", b" ", b"\n", b"b", b"$"], ends=(5,)) == [("a\n \nb$", Finish.EOS)]


def test_an_end_token_is_silent_and_ends_the_branch_even_on_a_boundary():
    assert written([b"a", b""], ends=(2,)) == [("a", Finish.EOS)]
    assert written([b"a", b"\n\n"], ends=(2,)) == [("a\n\n", Finish.EOS)]


def test_a_step_that_closes_with_a_boxed_answer_ends_the_branch():
    steps = written([b"x=1", b"\n\n", b"\\box", b"ed{1}", b"\n\n", b"more"])
    assert steps == [("x=1\n\n", None), ("\\boxed{1}\n\n", Finish.ANSWER)]


def test_a_step_is_cut_at_its_limit_and_not_where_it_closes_there():
    assert written([b"a", b"b", b"c", b"\n\n", b"d", b"$"], ends=(6,), max_step_tokens=3) == [("abc", Finish.LENGTH)]
    assert written([b"a", b"b", b"c", b"\n\n", b"d", b"$"], ends=(6,), max_step_tokens=4) == [("abc\n\n", None), ("d$", Finish.EOS)]


@pytest.mark.parametrize("limit", [{"max_tokens": 4}, {"max_positions": 5}], ids=str)
def test_a_branch_is_cut_where_its_tokens_or_the_models_positions_are_used_up(limit):
    assert written([b"a", b"\n\n", b"c", b"d", b"e", b"$"], **limit) == [("a\n\n", None), ("cd", Finish.LENGTH)]


def test_a_step_that_closes_on_the_last_position_leaves_no_room_for_another():
    assert written([b"a", b"\n\n", b"c"], max_tokens=2) == [("a\n\n", Finish.LENGTH)]


def test_a_trajectory_ends_at_the_step_limit():
    policy = chain_policy([b"?", b"a\n\n"])
    drawn = draw_all(policy, Cot(max_steps=3).program(root_branch([0])), 1, max_steps=3)
    assert [step.finish for step in drawn.branches[0].steps] == [None, None, Finish.DEPTH]


def test_a_character_across_tokens_is_one_character_of_the_step():
    assert written([b"\xe2\x82", b"\xac", b"$"], ends=(3,)) == [("€$", Finish.EOS)]


@pytest.mark.parametrize(
    ("mode", "steps"),
    [
        ("blank-line", ["Hm.\n\n\n", "## Step 1: a\nStep 12: b$"]),
        ("header", ["Hm.\n\n\n## Step", " 1: a\nStep 12: b$"]),
        ("numbered", ["Hm.\n\n\n## Step 1: a\nStep 12:", " b$"]),
    ],
)
def test_a_header_is_the_end_of_the_step_before_it(mode, steps):
    pieces = [b"H", b"m.\n", b"\n\n", b"##", b" Step", b" 1: a\n", b"Step", b" ", b"12", b":", b" b", b"$"]
    out = written(pieces, ends=(12,), mode=mode)
    assert [text for text, _ in out] == steps
    assert [finish for _, finish in out] == [*[None] * (len(steps) - 1), Finish.EOS]


WHITE_SPACE = " \t\n\r\v\f"


def closes(mode: str, text: str) -> bool:
    """The definition: whether a step that says `text` is over, line by line."""
    if mode == "blank-line":
        return "\n\n" in text.lstrip(WHITE_SPACE)
    header = {"header": "## Step", "numbered": "Step [0-9]+:"}[mode]
    lines = text.split("\n")
    return any(re.match(header, line) and "".join(lines[:i]).strip(WHITE_SPACE) for i, line in enumerate(lines))


def assert_closes_as_defined(rule: StepRule, mode: str, tokens: list[int]) -> bool:
    """The rule closes with the token that the definition says, the state resting from there on; whether there is one."""
    states = np.full(1, NO_TEXT, np.uint8)
    for i, token in enumerate(tokens):
        states = rule.advance(np.array([token]), states)
        ref = closes(mode, b"".join(rule.token_bytes[t] for t in tokens[: i + 1]).decode("utf-8", "replace"))
        assert (states[0] == CLOSED) == ref, (mode, [rule.token_bytes[t] for t in tokens[: i + 1]])
    return ref


PARTS = [b"a", b"\n", b" ", b"\xac", b"#", b"Step", b"S", b"t", b"e", b"p", b" 1", b"2", b":", b"## Step", b"\nStep 3"]
byte_tokens = st.lists(st.lists(st.sampled_from(PARTS), max_size=5).map(b"".join), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(pieces=byte_tokens, mode=st.sampled_from(sorted(STEP_MARKERS)))
@example(pieces=[b"a\n", b"", b"", b"\n"], mode="blank-line")
@example(pieces=[b"\n", b"\na\n", b"\n"], mode="blank-line")
@example(pieces=[b"a\n#", b"\n## St", b"ep"], mode="header")
@example(pieces=[b"a\nStep 1", b"2", b"\nStep ", b"34", b":"], mode="numbered")
@example(pieces=[b"a\nStep ", b"\xb2:", b"\nStep :", b"1:"], mode="numbered")
def test_a_step_closes_where_the_bytes_so_far_hold_the_marker_behind_text(pieces, mode):
    assert_closes_as_defined(StepRule(pieces, [], len(pieces) + 3, mode), mode, list(range(len(pieces))))


def cut_at_random(text: bytes, id_of: dict[bytes, int], rng: random.Random) -> list[int]:
    """Some ids of the vocabulary that say `text`: hardly ever those that the tokenizer would choose."""
    ids = []
    while text:
        length = rng.choice([n for n in range(1, 17) if text[:n] in id_of])
        ids.append(id_of[text[:length]])
        text = text[length:]
    return ids


@pytest.mark.parametrize("name", ["qwen2.5", "llama-3.1", "mistral-7b-v0.1"])
def test_steps_close_alike_however_real_vocabularies_cut_the_text(shared, name):
    if not (shared / "tokenizers" / name).is_dir():
        pytest.skip(f"needs the tokenizer of {name}")
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    table, rng = token_bytes(tokenizer), random.Random(41)
    id_of = {piece: i for i, piece in enumerate(table) if piece}
    closed = dict.fromkeys(STEP_MARKERS, 0)
    parts = "\n|\n|\n\n|\n## Step|## Step|\nStep 4:|\nStep |Step|#| |7|12:|:|Let x|\u00bd|\u6f22|\u00a0|.\r\n".split("|")
    for _ in range(150):
        text = "".join(rng.choices(parts, k=rng.randint(1, 14)))
        for ids in (cut_at_random(text.encode(), id_of, rng), tokenizer(text, add_special_tokens=False)["input_ids"]):
            used = sorted(set(ids))
            for mode in STEP_MARKERS:
                rule = StepRule([table[i] for i in used], [], len(used), mode)
                closed[mode] += assert_closes_as_defined(rule, mode, [used.index(i) for i in ids])
    assert min(closed.values()) > 10


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
    policy = Policy(runner, StepRule(token_bytes(tokenizer), [tokenizer.eos_token_id], len(tokenizer)), max_rows=4)
    drawn = draw_all(policy, rounds(root_branch(prompt), [1, 1, 1, 1, 1], policy), len(prompt))
    (branch,) = (node for node in drawn.nodes if node.finished)
    assert [step.text for step in branch.steps][0] == "First, x = 2.\n\n" and len(branch.steps) == 4
    assert [token for step in branch.path for token in step.tokens] == prompt + script
    assert [decoder.read[i] for i in range(len(prompt + script) - 1)] == (prompt + script)[:-1]

    turns = [{"role": "user", "content": "What is x?"}, {"role": "assistant", "content": branch.solution}]
    again = tokenizer.apply_chat_template(turns, tokenize=False)
    assert said in again and "x = 2" not in again


def test_an_engine_cuts_steps_as_it_is_told(model):
    with Engine.from_pretrained(model[1], steps="header", kv_bytes=1 << 20) as engine:
        rule = engine.policy.rule
        for mode in STEP_MARKERS:
            same = np.array_equal(rule._after, StepRule(rule.token_bytes, [], len(rule.token_bytes), mode)._after)
            assert same == (mode == "header")
    with pytest.raises(EngineError, match="steps='lines' is unknown; known: blank-line, header, numbered"):
        EngineConfig(steps="lines")


def test_ids_beyond_the_tokenizer_add_nothing():
    rule = StepRule([b"a", b"b"], [1], 5)
    assert rule.text([0, 4, 1, 2]) == "ab"
    assert rule.eos.tolist() == [False, True, False, False, False]


# Tokens, against transformers and the definition of sampling.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(transformers model, the directory it was saved to): steps of a dozen tokens, hardly an end."""
    directory = tmp_path_factory.mktemp("policy")
    return random_policy_directory(directory, seed=19, leans={"<|endoftext|>": -9.0, "\n\n": 2.5}), directory


def load(model, *, num_blocks: int = 200, max_rows: int = 64, **how) -> Policy:
    decoder = load_decoder(model[1], **how)
    runner = ModelRunner(decoder, make_backend("reference" if how else "per_branch"), num_blocks=num_blocks, block_size=4)
    runner.cache.k.fill_(torch.nan)  # whoever reads what was never written draws nonsense
    runner.cache.v.fill_(torch.nan)
    return Policy(runner, StepRule(token_bytes(load_tokenizer(model[1])), [0], decoder.spec.vocab_size), max_rows=max_rows)


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
            assert policy._active.size or counts.pinned == counts.filling == 0

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
