"""Batch lines, an engine that is a checksum to answer them, and what it must answer."""

import json

import numpy as np

from qwen_jax.batch import run as batches
from qwen_jax.batch.lines import CHAT, COMPLETIONS, Input
from qwen_jax.batch.reader import Defaults, Reader
from qwen_jax.batch.results import Results
from qwen_jax.engine.engine import Engine, EngineConfig
from qwen_jax.engine.request import Request, Sampling
from qwen_jax.text.tokenizer import Tokenizer
from support.checksum_engine import MAX_LEN, MODEL, TREE, alone, replicas
from support.fake_runner import POISON, VOCAB, FakeRunner
from support.vocabularies import byte_level, save, small_vocabulary

SETTINGS = {"model": "abc", "seed": 0}
END = 3


def tokenizer(directory) -> Tokenizer:
    save(byte_level(*small_vocabulary()), directory)
    return Tokenizer.load(directory)


def reader(tokenizer, *, vocab_size=320, max_len=2048, eos_ids=(), **defaults) -> Reader:
    sampling = Sampling(**defaults.pop("sampling", {}))
    return Reader(
        tokenizer=tokenizer,
        defaults=Defaults(**{"max_new_tokens": 16} | defaults, sampling=sampling),
        vocab_size=vocab_size,
        max_len=max_len,
        eos_ids=eos_ids,
    )


def completion(custom_id, prompt=(1, 2), **body):
    return line(custom_id, COMPLETIONS, {"prompt": prompt, **body})


def chat(custom_id, *texts, **body):
    messages = [{"role": "user", "content": text} for text in texts or ["Why?"]]
    return line(custom_id, CHAT, {"messages": messages, **body})


def line(custom_id, url, body, **more):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more}


def write(path, lines):
    """Writes lines: objects, or bytes as they are."""
    raw = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines]
    path.write_bytes(b"".join(each + b"\n" for each in raw))
    return path


def read(path):
    """The records of an output by custom_id, else by id, without the time in them."""
    assert path.read_bytes().endswith(b"\n")
    records = [json.loads(each) for each in path.read_bytes().splitlines()]
    for record in records:
        record["response"]["body"].pop("created", None)
    found = {record["custom_id"] or record["id"]: record for record in records}
    assert len(found) == len(records)
    return found


def engine(count=1, *, max_seqs=3, page=4):
    """An engine, or replicas, whose answers are checksums of all that is in the cache."""
    config = EngineConfig(
        max_len=MAX_LEN, max_seqs=max_seqs, page=page, slices=(8, 2), whole_slices=True
    )
    if count > 1:
        return replicas(count, config)
    return Engine(MODEL, TREE, config, make_runner=FakeRunner)


def requests(rng, count):
    """Completions of ids, whose prompts often begin alike."""
    made = []
    for number in range(count):
        prompt = [number % 2] * int(rng.integers(1, 30)) + rng.integers(0, VOCAB - 1, 3).tolist()
        made.append(completion(f"r{number}", prompt, max_tokens=int(rng.integers(1, 9))))
    return made


FAULTY = [
    b"{",
    completion("refused", (1, 2), n=2),
    completion("long", [1] * MAX_LEN),
    completion("poisoned", (1, POISON), max_tokens=2),
    b'{"custom_id": ""}',
]


def mixed(seed, count=12):
    """Requests, with lines between them that are refused or fail."""
    rng = np.random.default_rng(seed)
    lines = requests(rng, count)
    for fault in FAULTY:
        lines.insert(int(rng.integers(len(lines) + 1)), fault)
    return lines


def expected(tokenizer, each):
    """Text, reason and length of the answer to one line, by definition."""
    body = each["body"]
    tokens, finish = alone(
        Request(prompt=tuple(body["prompt"]), max_new_tokens=body["max_tokens"], eos_ids=(END,)),
        False,
    )
    return tokenizer.decode(tokens), finish, len(tokens)


def run(source, output, tokenizer, *, serving=None, settings=SETTINGS, **more):
    """Answers a file; returns what this came to."""
    asked = batches.items(
        Input(source), reader(tokenizer, vocab_size=VOCAB, max_len=MAX_LEN, eos_ids=(END,))
    )
    with Results(output, settings) as kept:
        return batches.run(
            serving or engine(),
            tokenizer,
            batches.missing(asked, kept, batches.Totals()),
            kept,
            model="tiny",
            **more,
        )
