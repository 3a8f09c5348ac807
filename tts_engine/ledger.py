"""What a search cost: what was computed, and what the same work would have been without sharing. Counts only, no clocks but one."""

from dataclasses import asdict, dataclass, fields


@dataclass(slots=True, kw_only=True)
class ModelLedger:
    """One model's part. FLOPs count multiply and add as two; norms, softmax and sampling are left out as everyone does."""

    tokens_computed: int = 0  # tokens that went through the layers, recomputed ones each time
    tokens_recomputed: int = 0  # of these, tokens whose KV had been there before and was evicted
    linear_flops: int = 0
    attention_flops: int = 0
    head_flops: int = 0  # logits where a token was drawn; the PRM's head where a score was read

    @property
    def flops(self) -> int:
        return self.linear_flops + self.attention_flops + self.head_flops


@dataclass(slots=True, kw_only=True)
class PolicyLedger(ModelLedger):
    tokens_generated: int = 0  # tokens drawn, whether their branch was kept or not
    tokens_unshared: int = 0  # prompt and steps of every trajectory, each prefilled and decoded on its own


@dataclass(slots=True, kw_only=True)
class PRMLedger(ModelLedger):
    steps_scored: int = 0
    tokens_reread: int = 0  # what reading each scored step's whole path anew would have computed


@dataclass(slots=True, kw_only=True)
class Ledger:
    """The cost of one search, policy and PRM apart."""

    policy: PolicyLedger
    prm: PRMLedger
    seconds: float = 0.0  # from the search's first request to its last answer, other searches running beside it

    @classmethod
    def empty(cls) -> "Ledger":
        return cls(policy=PolicyLedger(), prm=PRMLedger())

    @property
    def flops(self) -> int:
        """Policy and PRM together."""
        return self.policy.flops + self.prm.flops

    def add(self, other: "Ledger") -> None:
        """Count `other` in; seconds add up too, so they are machine time only where nothing ran side by side."""
        for part in ("policy", "prm"):
            mine, theirs = getattr(self, part), getattr(other, part)
            for field in fields(mine):
                setattr(mine, field.name, getattr(mine, field.name) + getattr(theirs, field.name))
        self.seconds += other.seconds

    def as_dict(self) -> dict:
        """Plain numbers, totals included, for JSON."""
        record = asdict(self)
        for part in ("policy", "prm"):
            record[part]["flops"] = getattr(self, part).flops
        return record
