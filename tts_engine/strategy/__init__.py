"""Which method to spend a budget on: how hard a problem is, what serves problems so hard best, smaller budgets without a search."""

from ..errors import EngineError


class StrategyError(EngineError):
    """A strategy, or runs to make one of, that cannot be used as asked."""
