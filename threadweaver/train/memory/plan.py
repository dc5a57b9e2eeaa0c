"""What a run holds in each of its phases, and whether its device has that much."""

from __future__ import annotations

from dataclasses import dataclass

from threadweaver.train.memory.target import Target


@dataclass(frozen=True)
class Part:
    """Bytes that a phase holds, and a remark."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Phase:
    """What is on the device at a time.

    Attributes:
        parts: what there is in it.
        total: most that is held at once; less than the sum where parts are not there together.
        host: bytes that it holds on the host instead of the device.
        engine: its KV pages are those of this section of the settings, if it has any.
        tokens: of a pass, or of all KV pages.
    """

    title: str
    parts: tuple[Part, ...]
    total: int
    host: int = 0
    engine: str | None = None
    tokens: int = 0

    def part(self, name: str) -> int:
        """Bytes of the part of this name, 0 if there is none."""
        return sum(part.bytes for part in self.parts if part.name == name)


@dataclass(frozen=True)
class Plan:
    """The phases of a run, one after another, and where they are to be."""

    target: Target
    phases: tuple[Phase, ...]

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        return self.fullest.total <= self.target.usable
