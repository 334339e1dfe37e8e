"""Batch lines, an engine that is a checksum to answer them, and what it must answer."""

import json
from unittest import mock

import jax.numpy as jnp
from test_serving import MAX_LEN, MODEL, alone

from qwen_jax.batch import run as batches
from qwen_jax.batch.lines import CHAT, COMPLETIONS, Input
from qwen_jax.batch.reader import Defaults, Reader
from qwen_jax.batch.results import Results
from qwen_jax.engine import data_parallel
from qwen_jax.engine import engine as engines
from qwen_jax.engine.engine import EngineConfig
from qwen_jax.engine.request import Request, Sampling
from qwen_jax.text.tokenizer import Tokenizer
from support.fake_runner import VOCAB, FakeRunner
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
    with (
        mock.patch.object(engines, "Runner", FakeRunner),
        mock.patch.object(data_parallel, "split", lambda weights: [weights] * count),
    ):
        tree = {"x": jnp.zeros(1)}
        return (data_parallel.Replicas if count > 1 else engines.Engine)(MODEL, tree, config)


def requests(rng, count):
    """Completions of ids, whose prompts often begin alike."""
    made = []
    for number in range(count):
        prompt = [number % 2] * int(rng.integers(1, 30)) + rng.integers(0, VOCAB - 1, 3).tolist()
        made.append(completion(f"r{number}", prompt, max_tokens=int(rng.integers(1, 9))))
    return made


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
