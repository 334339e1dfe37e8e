"""Page pool: allocation of cache pages, and sharing of pages with equal content."""

import collections
from collections.abc import Hashable, Sequence


class Pages:
    """Reference counts of cache pages, and an index of full pages by content.

    Page 0 is never handed out: padding writes there. A page is *used* while a
    sequence holds it and *free* otherwise; a free page whose content is known
    keeps it, and can be shared again, until its turn comes to be taken, the
    least recently used first.

    Content is a chain: a page is known by its tokens and the prefix_key of the page
    before it, and no prefix_key is used twice. Equal prefix keys therefore mean
    equal token ids from the start of the sequence, compared exactly, not by a
    hash that may collide. The first prefix_key of a chain stands for everything else
    that keys and values depend on, such as the attention temperature.

    Args:
        num_pages: pages of the cache, page 0 included.

    Attributes:
        total: pages that can be handed out.
    """

    def __init__(self, num_pages: int):
        self.total = num_pages - 1
        self._holders = [0] * num_pages
        self._blank = list(range(num_pages - 1, 0, -1))
        self._known: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._pages: dict[tuple[Hashable, tuple[int, ...]], tuple[int, int]] = {}
        self._keys: dict[int, tuple[Hashable, tuple[int, ...]]] = {}
        self._num_links = 0

    @property
    def free(self) -> int:
        """Number of pages that `take` can hand out."""
        return len(self._blank) + len(self._known)

    @property
    def used(self) -> int:
        """Number of pages that at least one sequence holds."""
        return sum(holders > 0 for holders in self._holders)

    def take(self, count: int) -> list[int]:
        """Allocates `count` pages to one holder and forgets their content.

        Raises:
            ValueError: if fewer than `count` are free.
        """
        if count > self.free:
            raise ValueError(f"{count} pages asked for, {self.free} of {self.total} are free")
        taken = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._known.popitem(last=False)
                del self._pages[self._keys.pop(page)]
            self._holders[page] = 1
            taken.append(page)
        return taken

    def give(self, pages: Sequence[int]) -> None:
        """Releases pages of one holder, given in the order of their sequence.

        The last ones will be handed out first, because only a whole prefix can be shared.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._keys:
                    self._known[page] = None
                else:
                    self._blank.append(page)

    def find(self, prefix_key: Hashable, tokens: tuple[int, ...]) -> tuple[int, int] | None:
        """Returns the page that continues `prefix_key` with `tokens`, and the prefix_key after it.

        None if no page is known to hold that content.
        """
        return self._pages.get((prefix_key, tokens))

    def share(self, page: int) -> None:
        """Adds a holder to a page that `find` returned."""
        self._known.pop(page, None)
        self._holders[page] += 1

    def record(self, prefix_key: Hashable, tokens: tuple[int, ...], page: int) -> int:
        """Registers the content of a page that is held; returns the prefix_key after it.

        If another page already has this content, that one stays the known one.
        """
        key = (prefix_key, tokens)
        if key not in self._pages:
            self._num_links += 1
            self._pages[key] = page, self._num_links
            self._keys[page] = key
        return self._pages[key][1]
