"""The results of a command's generations, for a table and for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from threadweaver.generate.engine import Engine, Generation
from threadweaver.generate.transcript import transcript
from threadweaver.trajectory import Codec


@dataclass(frozen=True)
class Response:
    """The figures of one response, or of the part that was decoded.

    Attributes:
        text: without the end token.
        finished: False if it was interrupted; a limit may have ended it (`limits`).
        total_tokens, longest_path_tokens, acceleration, blocks, mean_threads_per_block: as in
            GenerationSettings.path_lengths.
        sampled_tokens: of all its requests.
        decode_steps: engine steps that computed tokens of it.
        logprob: of all sampled tokens under the untempered model, summed; natural log.
        sampled_logprob: under the distributions they were drawn from.
        limits: how often limits ended something (LimitCounts).
    """

    text: str
    finished: bool
    total_tokens: int
    longest_path_tokens: int
    acceleration: float
    blocks: int
    mean_threads_per_block: float
    sampled_tokens: int
    decode_steps: int
    logprob: float
    sampled_logprob: float
    limits: dict[str, int]

    @classmethod
    def of(cls, generation: Generation, codec: Codec) -> Response:
        done = generation.weaver.done
        text = transcript(generation, codec)
        ids = generation.weaver.response if done else text
        lengths = generation.settings.path_lengths(ids, codec)
        records = [*generation.completions.values(), *generation.open.values()]
        return cls(
            codec.decode(text),
            done,
            lengths.total_tokens,
            lengths.longest_path_tokens,
            lengths.acceleration,
            lengths.blocks,
            lengths.mean_threads_per_block,
            sum(len(record.logprobs) for record in records),
            generation.steps,
            sum(sum(record.logprobs) for record in records),
            sum(sum(record.sampled_logprobs) for record in records),
            asdict(generation.weaver.limits),
        )


@dataclass(frozen=True)
class Outcome:
    """All responses, and the time they took.

    Attributes:
        seconds: wall-clock, without loading the model.
        tokens_per_second: sampled tokens.
        seconds_in: where the time went (Engine.seconds); "attention" is within "model".
    """

    responses: list[Response]
    seconds: float
    tokens_per_second: float
    seconds_in: dict[str, float]

    @classmethod
    def of(cls, engine: Engine, generations: Sequence[Generation], seconds: float) -> Outcome:
        responses = [Response.of(generation, engine.codec) for generation in generations]
        sampled = sum(response.sampled_tokens for response in responses)
        return cls(responses, seconds, sampled / seconds, engine.seconds)

    def print(self, console: Console) -> None:
        """A line for each response (threads: per block), and one for the time."""
        table = Table()
        for name in (
            "", "tokens", "critical path", "accel.", "blocks", "threads", "steps", "ended",
        ):  # fmt: skip
            table.add_column(name, justify="left" if name == "ended" else "right")
        for number, response in enumerate(self.responses, 1):
            table.add_row(
                str(number),
                f"{response.total_tokens:,}",
                f"{response.longest_path_tokens:,}",
                f"{response.acceleration:.1%}",
                str(response.blocks),
                f"{response.mean_threads_per_block:.1f}",
                f"{response.decode_steps:,}",
                _end(response),
            )
        console.print(table)
        share = {name: f"{value / self.seconds:.0%}" for name, value in self.seconds_in.items()}
        console.print(
            f"{self.seconds:.2f} s, {self.tokens_per_second:,.0f} tokens/s; "
            f"model {share['model']} (attention {share['attention']}), plan {share['plan']}, "
            f"sampling {share['sampling']}, orchestration {share['orchestration']}",
            highlight=False,
            soft_wrap=True,
        )


def _end(response: Response) -> str:
    if not response.finished:
        return "interrupted"
    return "at a limit" if any(response.limits.values()) else "by itself"
