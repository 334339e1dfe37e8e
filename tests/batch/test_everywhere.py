"""Lines that reach processes which have not read them."""

import json

import pytest
from support.batches import END, MAX_LEN, chat, completion, engine, mixed, reader, write
from support.fake_runner import VOCAB

from qwen_jax.batch import lockstep
from qwen_jax.batch import run as batches
from qwen_jax.batch.lines import Input
from qwen_jax.batch.reader import ParsedLine
from qwen_jax.distributed import multihost


class Logged:
    """An engine that remembers what it was asked and what it answered."""

    def __init__(self):
        self._engine, self.log = engine(max_seqs=3), []
        self.max_seqs = self._engine.max_seqs

    def add(self, request):
        self.log.append(request)
        return self._engine.add(request)

    def step(self):
        self.log.append(self._engine.step())
        return self.log[-1]

    def cancel(self, number):
        self.log.append(number)
        self._engine.cancel(number)


def read(path, tokenizer):
    known = reader(tokenizer, vocab_size=VOCAB, max_len=MAX_LEN, eos_ids=(END,))
    return batches.items(Input(path), known)


@pytest.fixture
def sent(monkeypatch):
    """Texts that process 0 has sent; the test's process is one of a job."""
    texts = []

    def shared(make):
        if multihost.is_first():
            texts.append(json.dumps(make()))
            return json.loads(texts[-1])
        return json.loads(texts.pop(0))

    monkeypatch.setattr(multihost, "is_alone", lambda: False)
    monkeypatch.setattr(multihost, "broadcast_json", shared)
    return texts


def test_a_process_that_reads_nothing_sees_the_same_events(sent, tmp_path, tokenizer, monkeypatch):
    lines = mixed(3)
    lines.insert(5, completion("stopped", (7, 1), max_tokens=20, stop=["a", "e", "t"]))
    source = write(tmp_path / "in", lines)

    def run(first):
        monkeypatch.setattr(multihost, "is_first", lambda: first)
        serving = Logged()
        found = lockstep.items(lambda: read(source, tokenizer))
        done = batches.run(serving, tokenizer, found, lockstep.NullSink(), model="tiny")
        return done, serving.log

    done, log = run(first=True)
    assert len(sent) == len(lines) + 1
    assert (done, log) == run(first=False)
    assert done.lines == len(lines)
    assert not sent


def test_all_but_the_body_of_a_line_arrives(sent, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(multihost, "is_first", lambda: True)
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 2**32 - 1}
    lines = [
        completion("all", (1, 2), max_tokens=3, stop=["x", "é"], **sampling),
        completion("faulty", (1, 2), n=2),
        completion("\ud800", "in the", ignore_eos=True, repetition_penalty=1.5),
        b"{",
    ]
    source = write(tmp_path / "in", lines)
    found = list(lockstep.items(lambda: read(source, tokenizer)))
    for (line, asked), (other, other_asked) in zip(found, read(source, tokenizer), strict=True):
        names = ("number", "custom_id", "id", "url")
        assert [getattr(line, name) for name in names] == [getattr(other, name) for name in names]
        if isinstance(other_asked, ParsedLine):
            assert (asked.request, asked.stop) == (other_asked.request, other_asked.stop)
        else:
            assert str(asked) == str(other_asked)
            assert vars(asked) == vars(other_asked)


def test_alone_nothing_is_sent(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(multihost, "broadcast_json", None)
    source = write(tmp_path / "in", [chat("a"), completion("b")])
    assert len(list(lockstep.items(lambda: read(source, tokenizer)))) == 2
