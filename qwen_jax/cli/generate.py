"""generate: continue a prompt of text or token ids."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from qwen_jax.cli import tokens as token_file
from qwen_jax.cli.answer import answer, write
from qwen_jax.cli.flags import AnswerFlags, Json, Kv, ModelArgument, ModelFlags, note, option
from qwen_jax.cli.on_hosts import expand_on_hosts
from qwen_jax.cli.profile import profiled
from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost
from qwen_jax.engine.request import MOST_LOGPROBS, Request, TokenLogprobs
from qwen_jax.llm import sessions
from qwen_jax.llm.documents import read_text
from qwen_jax.llm.model import open_model
from qwen_jax.llm.options import Within
from qwen_jax.text.tokenizer import Stream


@expand_on_hosts
@profiled
def generate(
    model: ModelArgument,
    model_flags: ModelFlags,
    answer_flags: AnswerFlags,
    prompt: Annotated[str | None, option("The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, option("A UTF-8 file that holds the prompt.")] = None,
    tokens: Annotated[
        Path | None, option("A file of token ids: a JSON list, or integers between white space.")
    ] = None,
    kv: Kv = None,
    ignore_eos: Annotated[bool, option("Do not end at end tokens.", "--ignore-eos")] = False,
    logprobs: Annotated[
        int | None,
        option(
            f"With --json, log-probabilities of each token and of this many likeliest, "
            f"from 0 to {MOST_LOGPROBS}.",
            metavar="K",
        ),
        Within(0, MOST_LOGPROBS),
    ] = None,
    json_output: Json = False,
):
    """Continue a prompt.

    The prompt is raw text, without a chat template; `ask` and `chat` apply it.
    Markers such as <|im_end|> in the text are ordinary characters. A prompt of
    token ids needs no tokenizer. Sampling follows generation_config.json, flags
    go first. With --kv the prompt goes on after the tokens of a session.

    Examples:
        qwen-jax generate ckpt/7b-1m --prompt "Once upon a time" --max-new-tokens 40
        qwen-jax generate ckpt/7b-1m --tokens ids.json --greedy --json
        qwen-jax generate ckpt/7b-1m --prompt-file book.txt --temperature 0.8 --stop "The End"
    """
    sources = {"--prompt": prompt, "--prompt-file": prompt_file, "--tokens": tokens}
    given = [flag for flag, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(f"give one of {', '.join(sources)}, not {' and '.join(given) or 'none'}")
    if logprobs is not None and not json_output:
        raise ConfigError("--logprobs has no effect without --json: add it")
    opened = open_model(model, model_flags)
    sampling = answer_flags.sampling(opened.generation)
    stops = answer_flags.stops()
    if tokens is not None:
        tokenizer = opened.tokenizer(required=bool(stops))
        ids = tuple(
            multihost.broadcast_json(lambda: token_file.read(tokens, opened.config.vocab_size))
        )
    else:
        tokenizer = opened.tokenizer()
        text = (
            multihost.broadcast_json(lambda: read_text(prompt_file))
            if prompt_file
            else prompt or ""
        )
        if not text:
            raise ConfigError(f"{given[0]} is empty: give at least one character")
        encode = tokenizer.encode_prompt if kv is None else tokenizer.encode_text
        ids = tuple(encode(text))
    kept = None if kv is None else sessions.open_kept(opened, kv)
    if kept is not None:
        ids = kept.tokens + ids
    request = Request(
        prompt=ids,
        max_new_tokens=answer_flags.max_new_tokens,
        sampling=sampling,
        eos_ids=() if ignore_eos else opened.end_ids(tokenizer),
        logprobs=logprobs,
    )
    opened.check_fits(len(ids), request.max_new_tokens)
    engine = opened.engine(
        len(ids) + request.max_new_tokens,
        vocab_limit=tokenizer.size if tokenizer else None,
        prefix_tokens=len(kept.tokens) if kept else 0,
        window=kept.window if kept else 0,
    )
    if kept is not None:
        kept.restore(engine, note)
    done = answer(
        engine,
        request,
        stream=Stream(tokenizer, stop=stops) if tokenizer else None,
        write=(lambda text: None) if json_output else write,
    )
    if json_output:
        found = {} if done.logprobs is None else {"logprobs": _logprobs(done.logprobs)}
        print(
            json.dumps(
                {
                    "token_ids": done.token_ids,
                    "text": done.text,
                    "finish": done.finish_reason,
                    "timings": done.timings.as_dict(),
                    "sparse": done.sparse and dataclasses.asdict(done.sparse),
                    **found,
                }
            )
        )
    else:
        print(*(done.token_ids if tokenizer is None else ()))
        note(done.summary)
    if done.finish_reason == "cancelled":
        raise KeyboardInterrupt


def _logprobs(found: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """Converts log-probabilities of tokens, and of the likeliest ids, to JSON objects."""
    return [{"logprob": each.logprob, "top": each.top} for each in found]
