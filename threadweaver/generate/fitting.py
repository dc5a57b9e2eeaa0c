"""Which prompts leave room for a response, before anything is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from threadweaver.generate.decoder import Decoder
from threadweaver.generate.settings import GenerationSettings, PromptTooLong
from threadweaver.trajectory import Prompt


class FittingPrompts(NamedTuple):
    """Of some prompts those that leave room.

    Attributes:
        ids: of each, by its place among all.
        skipped: how many do not.
        notes: lines to show: of what is skipped, and of responses that the context ends early.
    """

    ids: dict[int, list[int]]
    skipped: int
    notes: list[str]


def fitting_prompts(
    engine: Decoder,
    prompts: Sequence[tuple[str, Prompt]],
    settings: GenerationSettings,
    most_tokens: int | None = None,
) -> FittingPrompts:
    """Sorts out the prompts that leave no room for a response.

    Args:
        prompts: each with the file and row that it stands in.
        most_tokens: of a prompt and the first token after it, if that is less than the context.

    Raises:
        PromptTooLong: all are.
        ValueError: a prompt that cannot be decoded for another reason; names file and row.
    """
    fit: dict[int, list[int]] = {}
    first, least = "", settings.max_tokens
    for number, (source, prompt) in enumerate(prompts):
        try:
            engine.codec.check_markup(prompt)
            ids = engine.codec.encode_prompt(prompt)
            room = engine.check(ids, settings)
            if most_tokens is not None and len(ids) >= most_tokens:
                raise PromptTooLong(
                    f"the prompt has {len(ids)} tokens, and a path at most {most_tokens} "
                    "(optimization.batch_tokens)"
                )
        except PromptTooLong as error:
            first = first or f"{source}: {error}"
            continue
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        least = min(least, room)
        fit[number] = ids
    skipped = len(prompts) - len(fit)
    if not fit:
        raise PromptTooLong(f"none of {skipped:,} prompts leaves room for a response: {first}")
    notes = [f"{skipped:,} of {len(prompts):,} prompts are skipped: {first}"] if skipped else []
    if note := settings.context_note(least, engine.context_length):
        notes.append(note)
    return FittingPrompts(fit, skipped, notes)
