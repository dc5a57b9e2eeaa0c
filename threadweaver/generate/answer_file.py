"""An answer to every row of a data file: `python -m threadweaver.generate --data --out`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from threadweaver.data import Example, trajectory_row
from threadweaver.generate.engine import Engine, Generation
from threadweaver.generate.fitting import fitting_prompts
from threadweaver.generate.response_log import Key, ResponseLog
from threadweaver.generate.rollout import Rollout
from threadweaver.generate.sampler import stream_key
from threadweaver.generate.settings import MOST_RESPONSES, GenerationSettings
from threadweaver.progress import ResponsesProgress, print_line


class AnswerFile:
    """The prompts of a data file, and the responses to them.

    Args:
        examples: its rows.
        samples: responses to each prompt.
        seed: of the draws, with the numbers of row and sample.
        console: for notes and progress.

    Raises:
        ValueError: a prompt that cannot be decoded; names file and row. Prompts that leave no room
            for a response are skipped and counted, unless all are.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        engine: Engine,
        settings: GenerationSettings,
        samples: int,
        seed: int,
        console: Console,
    ):
        self._engine, self._settings, self._console = engine, settings, console
        self._samples, self._seed = samples, seed
        if len(examples) * samples > MOST_RESPONSES:
            raise ValueError(
                f"n: {len(examples) * samples:,} responses at once; at most {MOST_RESPONSES:,} can "
                "be decoded together"
            )
        prompts = [(example.source, example.prompt) for example in examples]
        fit, self.skipped, notes = fitting_prompts(engine, prompts, settings)
        self._prompts = {number: (examples[number], ids) for number, ids in fit.items()}
        for note in notes:
            print_line(console, note)

    @property
    def asked(self) -> list[list[int]]:
        """Ids of all prompts, in order."""
        return [ids for _, ids in self._prompts.values()]

    def decode(self, log: ResponseLog) -> list[dict[str, Any]]:
        """The responses as rows, in the order of the file; those in the log are not decoded again,
        and it gets the others as they come.

        Raises:
            LogError, NonFiniteLogits.
        """
        engine = self._engine
        rows: dict[Key, dict[str, Any]] = {}
        open: dict[Key, Generation] = {}
        for key, (_, ids) in self._keys():
            if key in log.rows:
                rollout = log.rollout(key, ids, self._settings, engine.codec, engine.context_length)
                rows[key] = self._row(key, rollout, self._text(rollout))
            else:
                seed = stream_key((self._seed, key.problem, key.sample))
                open[key] = engine.add(ids, self._settings, seed)
        count = len(rows) + len(open)
        start = time.perf_counter() - log.elapsed(self._settings.mode)
        with ResponsesProgress(self._console, "answering", count, engine) as progress:

            def on_step(_: Sequence[Any]) -> None:
                if engine.unfinished < len(open):
                    for key in [key for key, one in open.items() if one.weaver.done]:
                        rollout = open.pop(key).rollout()
                        text = self._text(rollout)
                        log.add(key, rollout, text, time.perf_counter() - start)
                        rows[key] = self._row(key, rollout, text)
                progress.decoded(count - engine.unfinished)

            engine.run(on_step, keep=False)
        return [rows[key] for key, _ in self._keys()]

    def _keys(self) -> Iterator[tuple[Key, tuple[Example, list[int]]]]:
        for number, prompt in self._prompts.items():
            for sample in range(self._samples):
                yield Key(self._settings.mode, number, sample), prompt

    def _text(self, rollout: Rollout) -> str:
        codec = self._engine.codec
        return codec.decode([id for id in rollout.response if id not in codec.end_ids])

    def _row(self, key: Key, rollout: Rollout, text: str) -> dict[str, Any]:
        example, _ = self._prompts[key.problem]
        truth = example.ground_truth
        row = trajectory_row(example.prompt, text, truth)
        if truth is None:
            del row["reward_model"]
        return {
            **row,
            "sample": key.sample,
            **self._settings.path_lengths(rollout.response, self._engine.codec).as_dict(),
            "decode_steps": rollout.decode_steps,
            "limits": asdict(rollout.limits),
            "source": example.source,
        }
