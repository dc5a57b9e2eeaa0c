"""The device's side of a page pool: pages that hold token labels instead of keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from threadweaver.generate import PageTable, Writes


class SimulatedPages:
    def __init__(self, num_pages: int, page_size: int):
        self.pages = [[-1] * page_size for _ in range(num_pages)]

    def run(self, writes: Writes, tokens: Sequence[int]) -> None:
        """Does what the device does for one append."""
        for source, target, filled in writes.copies:
            self.pages[target][:filled] = self.pages[source][:filled]
        for slot, token in zip(writes.slots.tolist(), tokens, strict=True):
            page, offset = divmod(slot, len(self.pages[0]))
            self.pages[page][offset] = token

    def read(self, table: PageTable) -> list[int]:
        """Tokens as a decode kernel sees them through the table."""
        return [id for page in table.pages for id in self.pages[page]][: table.length]
