"""The results of a command's generations, for a table and for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from threadweaver.generate.engine import Engine, Generation
from threadweaver.generate.transcript import transcript
from threadweaver.trajectory import Codec


def response_row(generation: Generation, codec: Codec) -> dict[str, Any]:
    """The figures of one response, or of the part that was decoded, for JSON.

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
    text = transcript(generation, codec)
    ids = generation.weaver.response if generation.weaver.done else text
    records = [*generation.completions.values(), *generation.open.values()]
    return {
        "text": codec.decode(text),
        "finished": generation.weaver.done,
        **generation.settings.path_lengths(ids, codec).as_dict(),
        "sampled_tokens": sum(len(record.logprobs) for record in records),
        "decode_steps": generation.steps,
        "logprob": sum(sum(record.logprobs) for record in records),
        "sampled_logprob": sum(sum(record.sampled_logprobs) for record in records),
        "limits": asdict(generation.weaver.limits),
    }


@dataclass(frozen=True)
class Outcome:
    """All responses, and the time they took.

    Attributes:
        responses: by `response_row`.
        seconds: wall-clock, without loading the model.
        tokens_per_second: sampled tokens.
        seconds_in: where the time went (Engine.seconds); "attention" is within "model".
    """

    responses: list[dict[str, Any]]
    seconds: float
    tokens_per_second: float
    seconds_in: dict[str, float]

    @classmethod
    def of(cls, engine: Engine, generations: Sequence[Generation], seconds: float) -> Outcome:
        responses = [response_row(generation, engine.codec) for generation in generations]
        sampled = sum(response["sampled_tokens"] for response in responses)
        return cls(responses, seconds, sampled / seconds, engine.seconds)

    def print(self, console: Console) -> None:
        """A line for each response (threads: per block), and one for the time."""
        table = Table()
        for name in (
            "", "tokens", "critical path", "accel.", "blocks", "threads", "steps", "ended",
        ):  # fmt: skip
            table.add_column(name, justify="left" if name == "ended" else "right")
        for number, r in enumerate(self.responses, 1):
            tokens, longest = r["total_tokens"], r["longest_path_tokens"]
            threads, steps = r["mean_threads_per_block"], r["decode_steps"]
            cells = f"{number}", f"{tokens:,}", f"{longest:,}", f"{r['acceleration']:.1%}"
            table.add_row(*cells, f"{r['blocks']}", f"{threads:.1f}", f"{steps:,}", _end(r))
        console.print(table)
        share = {name: f"{value / self.seconds:.0%}" for name, value in self.seconds_in.items()}
        console.print(
            f"{self.seconds:.2f} s, {self.tokens_per_second:,.0f} tokens/s; "
            f"model {share['model']} (attention {share['attention']}), plan {share['plan']}, "
            f"sampling {share['sampling']}, orchestration {share['orchestration']}",
            highlight=False,
            soft_wrap=True,
        )


def _end(response: dict[str, Any]) -> str:
    if not response["finished"]:
        return "interrupted"
    return "at a limit" if any(response["limits"].values()) else "by itself"
