"""Scheduling: queues and the token-budget scheduler. Integers only, no array library."""

from zif.scheduling.scheduler import TokenBudgetScheduler

__all__ = ["TokenBudgetScheduler"]
