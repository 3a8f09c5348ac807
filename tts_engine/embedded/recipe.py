"""What the embedded models are: sizes, token budgets, learning rates and seeds. Numbers only; train.py acts on them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRecipe:
    """One policy: Qwen2 style, head_dim 32, tied embeddings. Each leg is (tokens of fresh problems, peak learning rate): a cosine
    of its own, after which the weights are rounded to bfloat16. checked: its solutions check every result, and redo wrong ones."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    legs: tuple[tuple[int, float], ...]
    seed: int
    checked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PRMRecipe:
    """One PRM: the policy `start` with ADDED_LAYERS layers and a head on top. Each leg is (tokens of labelled trajectories, peak
    learning rate), as for a policy: the first trains only what was added, the last learns scores alone, and without drill."""

    name: str
    family: str
    trained_on: str  # "samples and drill": of the policies, of all levels; or "corrupted gold" of level 1
    seed: int
    legs: tuple[tuple[int, float], ...] = ((2_000_000, 3e-3), (7_000_000, 1.5e-3), (3_000_000, 5e-4))
    start: str = "policy-m"


BATCH_TOKENS = 2048
POLICIES = {
    p.name: p
    for p in (
        PolicyRecipe(name="policy-s", hidden_size=64, num_layers=3, num_heads=2, num_kv_heads=1,
                     legs=((14_000_000, 4e-3),), seed=1),
        PolicyRecipe(name="policy-m", hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2,
                     legs=((12_000_000, 2.5e-3),), seed=2),
        PolicyRecipe(name="policy-l", hidden_size=224, num_layers=5, num_heads=7, num_kv_heads=1,
                     legs=((8_000_000, 1.5e-3), (5_000_000, 1e-3)), seed=3),
    )
}  # fmt: skip
PRMS = {
    p.name: p
    for p in (
        PRMRecipe(name="prm-good", family="qwen2.5-math-prm", trained_on="samples and drill", seed=4),
        PRMRecipe(name="prm-poor", family="math-shepherd", trained_on="corrupted gold", seed=5),
    )
}
# What only the study takes, and the package does not ship. Of the middle policy the same start, problems and budget, other traces;
# a PRM on the small policy, its learning rates higher and its budget smaller.
STUDY_POLICIES = {
    p.name: p
    for p in (
        PolicyRecipe(name="policy-m-redo", hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2,
                     legs=((12_000_000, 2.5e-3),), seed=2, checked=True),
    )
}  # fmt: skip
STUDY_PRMS = {
    p.name: p
    for p in (
        PRMRecipe(name="prm-small", family="qwen2.5-math-prm", trained_on="samples and drill", seed=4,
                  legs=((1_500_000, 3e-3), (4_500_000, 2.4e-3), (2_000_000, 8e-4)), start="policy-s"),
    )
}  # fmt: skip
STUDY_CHECKPOINTS = ("prm-good", (1_500_000, 3_000_000, 6_000_000, 9_000_000))  # whose training is saved, after how many tokens
ADDED_LAYERS = 2
SAMPLED_POLICIES = ("policy-s", "policy-m")  # whose solutions the good PRM learns from
SAMPLED_PROGRAMS, SAMPLED_DRAWS, SAMPLED_TEMPERATURE = 6000, 4, 0.8
SLIP_RATE, MOST_SLIPS = 0.3, 2  # of results in checked solutions: how often one is wrong, and how often in a row
LEVEL_MIX = {1: 1, 2: 1, 3: 1}  # relative frequency of levels among training problems
