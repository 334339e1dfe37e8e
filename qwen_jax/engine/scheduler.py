"""Scheduler: chooses the next prefill slice of one sequence, or a decode step of all."""

import collections
import dataclasses
import heapq
from collections.abc import Callable, Hashable

from qwen_jax.engine.layout import EngineLayout
from qwen_jax.engine.page_pool import Pages
from qwen_jax.engine.request import Sequence


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Prompt tokens `start` to `start + length` of one sequence, padded to `size`.

    Attributes:
        is_sparse: whether it is prefilled sparsely.
        copied: page to copy first into the one that holds `start`; None for no copy.
    """

    sequence: Sequence
    start: int
    length: int
    size: int
    is_sparse: bool = False
    copied: int | None = None

    @property
    def is_last(self) -> bool:
        return self.start + self.length == self.sequence.prompt_len


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """A decode step: one more token for each of `sequences`."""

    sequences: tuple[Sequence, ...]


class Scheduler:
    """Continuous batching over fixed shapes.

    A sequence is admitted when a row and the pages of its prompt and longest
    answer are there, in order of arrival; it then never waits for memory
    again. Prefill slices alternate with decode steps, and sequences that
    prefill take turns, so that nothing starves.

    Args:
        pages: pool of cache pages.
        layout: sizes of pages and slices.
        max_seqs: sequences that run at once.
        dense_tail: tokens at the end of a prompt that are always prefilled densely.
        whole_slices: share only pages that were computed in the same slices that the sharing
            prompt would use, so that other requests do not change how a prompt is cut.
        scales: maps a sequence's length in tokens to its factors on queries and keys. Pages are
            shared only between prompts for which these are equal.
    """

    def __init__(
        self,
        pages: Pages,
        *,
        layout: EngineLayout,
        max_seqs: int,
        dense_tail: int = 0,
        whole_slices: bool = False,
        scales: Callable[[int], tuple[float, float]],
    ):
        self._pages = pages
        self._layout, self._page = layout, layout.page
        self._dense_tail = dense_tail
        self._whole_slices = whole_slices
        self._scales = scales
        self.free_rows = list(range(max_seqs))
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._prefilling: collections.deque[Sequence] = collections.deque()
        self._decoding: list[Sequence] = []
        self._turn_to_decode = False
        self._is_full = False

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._prefilling or self._decoding)

    def add(self, sequence: Sequence) -> None:
        sequence.scales = self._scales(sequence.prompt_len)
        sequence.prefix_key = sequence.origin
        self._waiting.append(sequence)

    def cancelled(self) -> list[Sequence]:
        """Removes and returns the sequences that are marked as cancelled."""
        everyone = (*self._waiting, *self._prefilling, *self._decoding)
        taken = [sequence for sequence in everyone if sequence.cancelled]
        for sequence in taken:
            self.finish(sequence)
        return taken

    def next(self) -> Slice | Decode | None:
        """Returns the work of the next step, or None if there is none."""
        self._admit()
        if self._decoding and (self._turn_to_decode or not self._prefilling):
            self._turn_to_decode = False
            return Decode(sequences=tuple(self._decoding))
        if not self._prefilling:
            return None
        self._turn_to_decode = True
        sequence = self._prefilling[0]
        self._prefilling.rotate(-1)
        self._share(sequence)
        return self._slice(sequence)

    def prefilled(self, piece: Slice) -> None:
        """Records that a slice is in the cache."""
        sequence = piece.sequence
        is_whole = self._is_whole(piece)
        sequence.filled += piece.length
        if is_whole or not self._whole_slices:
            self._record(sequence)
        if piece.is_last:
            self._prefilling.remove(sequence)
            self._decoding.append(sequence)

    def decoded(self, sequence: Sequence) -> None:
        """Records that the last token of the answer so far is in the cache."""
        sequence.filled += 1
        # A prompt that repeats this answer would be prefilled with its own scales.
        if not self._whole_slices and self._scales(sequence.filled) == sequence.scales:
            self._record(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Removes a sequence and frees its row and pages."""
        for queue in (self._waiting, self._prefilling, self._decoding):
            if sequence in queue:
                queue.remove(sequence)
        self._pages.give(sequence.pages)
        sequence.pages = []
        if sequence.row >= 0:
            heapq.heappush(self.free_rows, sequence.row)
            sequence.row = -1
        self._is_full = False

    def freed(self) -> None:
        """Records that pages borrowed outside any sequence are free again."""
        self._is_full = False

    def _admit(self) -> None:
        while self._waiting and self.free_rows and not self._is_full:
            sequence = self._waiting[0]
            self._begin(sequence)
            self._share(sequence)
            missing = -(-sequence.capacity // self._page) - len(sequence.pages)
            if missing > self._pages.free:
                self._pages.give(sequence.pages)
                sequence.pages, sequence.filled, sequence.num_shared_pages = [], 0, 0
                sequence.prefix_key = sequence.origin
                # Not tried again, which costs a walk over the prompt, until something is freed.
                self._is_full = True
                return
            sequence.pages += self._pages.take(missing)
            sequence.row = heapq.heappop(self.free_rows)
            self._prefilling.append(self._waiting.popleft())

    def _begin(self, sequence: Sequence) -> None:
        """Shares the full pages of a sequence's prefix with it; a partial one is copied later."""
        if sequence.prefix is None:
            return
        sequence.filled = len(sequence.prefix.tokens)
        sequence.num_shared_pages = sequence.filled // self._page
        for page in sequence.prefix.pages[: sequence.num_shared_pages]:
            self._pages.share(page)
            sequence.pages.append(page)

    def _share(self, sequence: Sequence) -> None:
        """Replaces the pages that a sequence would fill next by pages of known equal content."""
        while not self._whole_slices or sequence.filled == sequence.num_shared_pages * self._page:
            found = self._known(sequence)
            if not found:
                return
            for page, prefix_key in found:
                self._pages.share(page)
                sequence.prefix_key = prefix_key
                if sequence.num_shared_pages < len(sequence.pages):
                    self._pages.give([sequence.pages[sequence.num_shared_pages]])
                    sequence.pages[sequence.num_shared_pages] = page
                else:
                    sequence.pages.append(page)
                sequence.num_shared_pages += 1
            sequence.filled = max(sequence.filled, sequence.num_shared_pages * self._page)

    def _known(self, sequence: Sequence) -> list[tuple[int, Hashable]]:
        """Returns the next page to share, or all pages of the next slice, each with the
        prefix_key after it; [] if nothing can be shared.
        """
        start, limit = sequence.num_shared_pages * self._page, sequence.prompt_len
        stop = start + self._page
        if self._whole_slices:
            stop = self._slice_stop(start)
            if sequence.sparse is not None:
                limit = min(limit, limit - self._dense_tail + 1)
        # The last token is always computed: its logits choose the first new one.
        if stop >= limit or stop % self._page:
            return []
        found, prefix_key = [], sequence.prefix_key
        for first in range(start, stop, self._page):
            page = self._pages.find(prefix_key, sequence.span(first, first + self._page))
            if page is None:
                return []
            found.append(page)
            prefix_key = page[1]
        return found

    def _is_whole(self, piece: Slice) -> bool:
        """Returns True if every longer prompt with the same prefix is cut into this slice too."""
        stop = piece.start + piece.length
        is_sparse = piece.sequence.sparse is not None
        return stop == self._slice_stop(piece.start) and piece.is_sparse == is_sparse

    def _slice_stop(self, start: int) -> int:
        """Returns the end of the slice at `start` of a prompt of unlimited length."""
        return start + self._layout.slice_bounds(start, start + self._layout.slices[0])[0]

    def _record(self, sequence: Sequence) -> None:
        """Registers the pages that have become full, so that other sequences can share them."""
        while (stop := (sequence.num_shared_pages + 1) * self._page) <= sequence.filled:
            tokens = sequence.span(stop - self._page, stop)
            page = sequence.pages[sequence.num_shared_pages]
            sequence.prefix_key = self._pages.record(sequence.prefix_key, tokens, page)
            sequence.num_shared_pages += 1

    def cut(self, start: int, stop: int, *, sparsely: bool) -> tuple[int, int, bool]:
        """Returns the length, padded size and sparsity of the slice at `start`.

        Args:
            start: position of its first token.
            stop: length of the prompt in tokens.
            sparsely: whether the prompt is prefilled sparsely, its dense tail aside.
        """
        is_sparse = sparsely and start < stop - self._dense_tail
        if is_sparse:
            stop -= self._dense_tail
        return *self._layout.slice_bounds(start, stop), is_sparse

    def _slice(self, sequence: Sequence) -> Slice:
        start, sparsely = sequence.filled, sequence.sparse is not None
        length, size, is_sparse = self.cut(start, sequence.prompt_len, sparsely=sparsely)
        prefix, copied = sequence.prefix, None
        if prefix is not None and start == len(prefix.tokens) and start % self._page:
            copied = prefix.pages[-1]
        return Slice(
            sequence=sequence,
            start=start,
            length=length,
            size=size,
            is_sparse=is_sparse,
            copied=copied,
        )
