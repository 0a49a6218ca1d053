"""The copies that the next plan will ask for, as long as they can be taken back. `tiers.py` is the only caller."""

from zif.contract import BlockLoad, BlockSave, Transfers


class PendingTransfers:
    """Collect transfers in an order that `carry_out` may execute as it is."""

    def __init__(self) -> None:
        self.saves: dict[int, BlockSave] = {}
        self.loads: dict[tuple[int, int], BlockLoad] = {}
        self._demotions: list[int] = []
        self._drops: list[int] = []

    @property
    def is_empty(self) -> bool:
        """Say whether there is nothing to ask for."""
        return not (self.saves or self.loads or self._demotions or self._drops)

    def demote(self, handle: int) -> None:
        """Move a copy down, after those that made room for it."""
        self._demotions.append(handle)

    def drop(self, handle: int) -> None:
        """Forget a copy, or not make it at all."""
        if self.saves.pop(handle, None) is None:
            self._drops.append(handle)

    def transfers(self) -> Transfers:
        """Return everything."""
        return Transfers([*self.saves.values()], [*self.loads.values()], self._demotions, self._drops)
