"""The device's side of a page pool: pages that hold token labels instead of keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from threadweaver.generate.pages import Copy, PageTable


class SimulatedPages:
    def __init__(self, num_pages: int, page_size: int):
        self.pages = [[-1] * page_size for _ in range(num_pages)]

    def run(self, copies: list[Copy], writes: Sequence[tuple[PageTable, Sequence[int]]]) -> None:
        """Does what the device does for one append: the last tokens of each table are new."""
        for source, target, filled in copies:
            self.pages[target][:filled] = self.pages[source][:filled]
        for table, tokens in writes:
            for position, token in enumerate(tokens, table.length - len(tokens)):
                page, slot = divmod(position, len(self.pages[0]))
                self.pages[table.pages[page]][slot] = token

    def read(self, table: PageTable) -> list[int]:
        """Tokens as a decode kernel sees them through the table."""
        return [id for page in table.pages for id in self.pages[page]][: table.length]
