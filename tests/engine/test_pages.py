"""Pages: nobody loses one, nobody gets one twice, content is compared exactly."""

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.draws import machine

from qwen_jax.engine.page_pool import Pages

NUM_PAGES = 9


def test_page_zero_is_never_handed_out():
    pages = Pages(NUM_PAGES)
    assert sorted(pages.take(NUM_PAGES - 1)) == list(range(1, NUM_PAGES))
    assert pages.free == 0


def test_more_pages_than_are_free_are_refused():
    pages = Pages(NUM_PAGES)
    pages.take(3)
    with pytest.raises(ValueError, match="6 pages asked for, 5 of 8 are free"):
        pages.take(6)
    assert pages.free == 5


def test_content_of_equal_hash_is_told_apart():
    first, second = (-1, 5), (-2, 5)
    assert hash(first) == hash(second)
    pages = Pages(NUM_PAGES)
    pages.record("root", first, pages.take(1)[0])
    assert pages.find("root", first) is not None
    assert pages.find("root", second) is None


def test_equal_tokens_after_different_beginnings_are_told_apart():
    pages = Pages(NUM_PAGES)
    a, b, c, d = pages.take(4)
    after_a = pages.record("root", (1,), a)
    after_b = pages.record("root", (2,), b)
    pages.record(after_a, (7,), c)
    assert pages.find(after_b, (7,)) is None
    pages.record(after_b, (7,), d)
    found = [pages.find(link, (7,)) for link in (after_a, after_b)]
    assert [page for page, _ in found if found] == [c, d]


def test_the_longest_unused_page_is_taken_first_and_ends_before_beginnings():
    pages = Pages(4)
    held = pages.take(3)
    link = "root"
    for token, page in enumerate(held):
        link = pages.record(link, (token,), page)
    pages.give(held)
    assert pages.free == 3
    assert [pages.take(1)[0] for _ in range(3)] == held[::-1]


def test_a_page_that_is_shared_again_is_not_taken():
    pages = Pages(3)
    first, second = pages.take(2)
    pages.record("root", (1,), first)
    pages.record("root", (2,), second)
    pages.give([first])
    pages.give([second])
    pages.share(first)
    assert pages.take(1) == [second]
    assert pages.find("root", (2,)) is None
    assert pages.find("root", (1,)) is not None


class Holders(RuleBasedStateMachine):
    """Holders that take, share, record and give, beside a model that only counts."""

    def __init__(self):
        super().__init__()
        self.pages = Pages(NUM_PAGES)
        self.held = []  # per holder: pages, links after them, how many are recorded
        self.content = {}  # page -> all tokens from the start of its sequence

    @rule(count=st.integers(1, 4), root=st.sampled_from("ab"))
    def take(self, count, root):
        if count > self.pages.free:
            return
        taken = self.pages.take(count)
        for page in taken:
            assert all(page not in pages for pages, _, _ in self.held)
            self.content.pop(page, None)
        self.held.append((taken, [root], [(root,)]))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), token=st.integers(0, 1))
    def record(self, data, token):
        pages, links, tokens = data.draw(st.sampled_from(self.held))
        if len(links) > len(pages):
            return
        page = pages[len(links) - 1]
        known = self.pages.find(links[-1], (token,))
        links.append(self.pages.record(links[-1], (token,), page))
        tokens.append((*tokens[-1], token))
        if known is None:
            self.content[page] = tokens[-1]
        else:
            assert self.content[known[0]] == tokens[-1]

    @rule(root=st.sampled_from("ab"), tokens=st.lists(st.integers(0, 1), max_size=3))
    def share(self, root, tokens):
        pages, links, history = [], [root], [(root,)]
        for token in tokens:
            found = self.pages.find(links[-1], (token,))
            if found is None:
                break
            page, link = found
            history.append((*history[-1], token))
            assert self.content[page] == history[-1]
            self.pages.share(page)
            pages.append(page)
            links.append(link)
        if pages:
            self.held.append((pages, links, history))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data):
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.pages.give(self.held.pop(index)[0])

    @invariant()
    def pages_are_free_or_used(self):
        used = {page for pages, _, _ in self.held for page in pages}
        assert self.pages.used == len(used)
        assert self.pages.free + self.pages.used == self.pages.total == NUM_PAGES - 1
        assert 0 not in used


TestHolders = machine(Holders, 100, 100)
