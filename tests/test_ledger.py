"""Costs of small searches, counted by hand."""

import json

from tts_engine.branch import root_branch
from tts_engine.ledger import Ledger, PolicyLedger, PRMLedger
from tts_engine.search import Cot, Majority
from tts_engine.search.requests import Expand
from tts_engine.testing import chain_policy, draw_all

# tiny_spec: 3 layers of d 8, q 8, k and v 4 each, inner 10; 100 tokens
LAYER = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 10
PER_TOKEN, PER_PAIR, HEAD = 2 * 3 * LAYER, 4 * 8 * 3, 2 * 100 * 8
UNREAD = 2 * (LAYER - 2 * 8 * 4)  # what the last layer spares a token behind which nothing is drawn

# Prompt "?" is tokens 0 to 4; then a step of four tokens with its blank line, then one of three with the end.
PIECES = [b"?", b"?", b"?", b"?", b"?", b"a", b"b", b"c", b"\n\n", b"d", b"e", b""]
PROMPT, END = (0, 1, 2, 3, 4), 11


def triangle(tokens: int) -> int:
    """(query, key) pairs of one causal path."""
    return tokens * (tokens + 1) // 2


def flops(ledger) -> tuple[int, int, int]:
    return ledger.linear_flops, ledger.attention_flops, ledger.head_flops


def test_one_trajectory_costs_every_token_but_its_last_and_a_head_for_each_drawn():
    ledger = draw_all(chain_policy(PIECES, ends=[END]), Cot().program(root_branch(PROMPT)), 5).ledger
    assert (ledger.tokens_generated, ledger.tokens_computed, ledger.tokens_recomputed) == (7, 5 + 4 + 2, 0)
    unread = triangle(4) * PER_PAIR // 3  # of the prompt, all but its last token
    assert flops(ledger) == (11 * PER_TOKEN - 4 * UNREAD, triangle(11) * PER_PAIR - unread, 7 * HEAD)
    assert ledger.flops == 11 * PER_TOKEN + 66 * PER_PAIR + 7 * HEAD - 4 * UNREAD - unread


def test_two_trajectories_share_the_prompt_and_the_logits_behind_it():
    """The steps are equal too: each draws its own, and what they read together (the blank line) is read once."""
    ledger = draw_all(chain_policy(PIECES, ends=[END]), Majority(n=2).program(root_branch(PROMPT)), 5).ledger
    assert (ledger.tokens_generated, ledger.tokens_computed) == (14, 5 + 2 * 3 + 1 + 2 * 2)
    behind_prompt = 6 + 7 + 8
    assert flops(ledger) == (
        16 * PER_TOKEN - 4 * UNREAD,
        (triangle(5) + 2 * behind_prompt + 9 + 2 * (10 + 11)) * PER_PAIR - triangle(4) * PER_PAIR // 3,
        (1 + 2 * 3 + 1 + 2 * 2) * HEAD,
    )


def test_children_of_one_step_read_its_last_token_once():
    def program(root):
        (step,) = yield Expand([root])
        return (yield Expand([step] * 3))

    ledger = draw_all(chain_policy(PIECES, ends=[END]), program(root_branch(PROMPT)), 5).ledger
    assert ledger.tokens_computed == 5 + 4 + 3 * 2
    assert ledger.head_flops == (1 + 3 + 1 + 3 * 2) * HEAD


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


def test_a_preempted_draw_pays_for_its_tokens_again_and_for_each_head_once():
    pieces = [b"?", *[b"a"] * 11, b""]
    policy = chain_policy(pieces, ends=[12], num_blocks=1 + 2 * 2, block_size=4)
    ledger = draw_all(policy, Majority(n=2).program(root_branch([0])), 1).ledger
    assert policy.preemptions == 1
    assert ledger.tokens_generated == 24
    assert ledger.head_flops == (24 - 1) * HEAD  # two first draws share the prompt's
    assert ledger.tokens_computed - ledger.tokens_recomputed == 1 + 2 * 11
    assert ledger.tokens_recomputed > 0


def test_ledgers_add_up_and_go_to_json():
    one = Ledger(policy=PolicyLedger(tokens_computed=3, linear_flops=10, attention_flops=4, head_flops=2, tokens_generated=2),
                 prm=PRMLedger(tokens_computed=5, linear_flops=100, steps_scored=1, tokens_reread=9), seconds=0.5)  # fmt: skip
    total = Ledger.empty()
    total.add(one)
    total.add(one)
    assert (total.flops, one.flops, total.seconds) == (232, 116, 1.0)
    record = json.loads(json.dumps(total.as_dict()))
    assert record["policy"]["flops"] == 32 and record["prm"]["flops"] == 200
    assert record["policy"]["tokens_computed"] == 6 and record["prm"]["tokens_reread"] == 18
