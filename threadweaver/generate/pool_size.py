"""How many KV pages an engine has: what kv_gigabytes names, or what its device has left."""

from __future__ import annotations

import os
from dataclasses import dataclass

from transformers import PreTrainedModel

from threadweaver.device import SHARE_KEPT_FREE, memory_of, unused_memory
from threadweaver.generate.runner import kv_page_bytes
from threadweaver.generate.settings import EngineSizes
from threadweaver.model import context_length, output_layer
from threadweaver.trajectory.ids import MOST_IDS

# Of a host's memory, for `auto`: pages take it only once they are written, and whatever else runs
# there has the rest. All of the memory counts, used or not, so that the same machine gives the same
# pool and a resumed run the same schedule.
SHARE_OF_HOST = 0.25

# A step holds, of its widest layer, this many results of its width at a time in the dtype of the
# layer, and of a logit, these bytes beside itself: in float32, sorted, with indices, as
# probabilities.
_WIDE_RESULTS = 6
_BYTES_OF_A_LOGIT = 32


@dataclass(frozen=True)
class PoolSize:
    """Of the pool of KV pages of an engine.

    Attributes:
        pages: how many.
        page_bytes: of one, all layers.
        page_size: tokens of one.
        reason: what `auto` was decided by; None: kv_gigabytes is a number.
    """

    pages: int
    page_bytes: int
    page_size: int
    reason: str | None = None

    @property
    def tokens(self) -> int:
        return self.pages * self.page_size

    @property
    def bytes(self) -> int:
        return self.pages * self.page_bytes

    def __str__(self) -> str:
        """A line to show."""
        reason = f": {self.reason}" if self.reason else ""
        return f"KV pages: {self.tokens:,} tokens, {self.bytes / 1e9:,.3g} GB{reason}"


@dataclass(frozen=True)
class PageNeeds:
    """What the number of pages follows from, apart from the device.

    Attributes:
        page_bytes, page_size: as of PoolSize.
        most_pages: that all sequences of a step can fill, each to the end of the context.
        set_aside: bytes that the largest step takes beside the pages, at most.
    """

    page_bytes: int
    page_size: int
    most_pages: int
    set_aside: int

    @classmethod
    def of(cls, model: PreTrainedModel, sizes: EngineSizes, autocast: bool) -> PageNeeds:
        """Args:
        model: of any device, or of tensors without memory.
        autocast: as of Runner.
        """
        per_sequence = -(-(context_length(model) or MOST_IDS) // sizes.page_size)
        return cls(
            kv_page_bytes(model, sizes.page_size, autocast),
            sizes.page_size,
            sizes.max_sequences * per_sequence,
            _step_bytes(model, sizes),
        )

    def auto(self, kind: str, memory: int, unused: int) -> PoolSize:
        """The pool of a device that has so many bytes, of which so many are left for an engine."""
        if kind == "cuda":
            room = unused - self.set_aside - int(memory * SHARE_KEPT_FREE)
            reason = f"what {memory / 1e9:,.3g} GB have left"
        else:
            room = int(memory * SHARE_OF_HOST)
            reason = f"{SHARE_OF_HOST:.0%} of {memory / 1e9:,.3g} GB"
        pages = max(0, room) // self.page_bytes
        if pages >= self.most_pages:
            pages, reason = self.most_pages, "all that max_sequences can fill"
        return PoolSize(pages, self.page_bytes, self.page_size, reason)

    def named(self, gigabytes: float) -> PoolSize:
        return PoolSize(int(gigabytes * 1e9 / self.page_bytes), self.page_bytes, self.page_size)


def pool_size(
    model: PreTrainedModel, sizes: EngineSizes, autocast: bool, reserve: int = 0
) -> PoolSize:
    """Of an engine of a model, on the device where the model is.

    Args:
        autocast: as of Runner.
        reserve: bytes of a GPU that others will take before the pages are filled.

    Raises:
        ValueError: kv_gigabytes is more than the device has, or less than a page.
    """
    device, asked = model.device, sizes.kv_gigabytes
    needs = PageNeeds.of(model, sizes, autocast)
    memory = memory_of(device)
    if asked == "auto":
        if device.type == "cpu":
            memory //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks of torchrun share it
        unused = unused_memory(device) - reserve if device.type == "cuda" else memory
        size = needs.auto(device.type, memory, unused)
        short = f"auto, and {size.reason}: {size.bytes / 1e9:.3g} GB"
        if device.type == "cuda":
            short += (
                f" after {needs.set_aside / 1e9:.3g} GB that a step takes (lower max_sequences or "
                "max_batch_tokens, or end what else uses the GPU)"
            )
    else:
        if asked * 1e9 > memory:
            raise ValueError(
                f"kv_gigabytes is {asked:g}: {device.type} has {memory / 1e9:.3g} GB of memory in "
                "all"
            )
        size, short = needs.named(asked), f"{asked}"
    if size.pages < 1:
        raise ValueError(
            f"kv_gigabytes is {short}: a page of {sizes.page_size} tokens takes "
            f"{needs.page_bytes / 1e9:.3g} GB"
        )
    return size


def _step_bytes(model: PreTrainedModel, sizes: EngineSizes) -> int:
    """At most what the largest prefill takes while it runs, and draws of all sequences."""
    head = output_layer(model).linear.weight
    table = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() >= 2 and p is not head and p is not table]
    widest = max(max(p.shape[-2:]) for p in matrices)
    tokens = max(sizes.max_batch_tokens, sizes.max_sequences)
    experts = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    per_logit = head.dtype.itemsize + _BYTES_OF_A_LOGIT
    of_layer = tokens * experts * widest * model.dtype.itemsize * _WIDE_RESULTS
    return of_layer + sizes.max_sequences * len(head) * per_logit
