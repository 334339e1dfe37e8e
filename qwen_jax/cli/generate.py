"""generate: continue a prompt of text or token ids."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

from qwen_jax.cli import tokens as prompts
from qwen_jax.cli.answer import front, respond, write
from qwen_jax.cli.flags import AnswerFlags, Json, Kv, ModelArgument, ModelFlags, note, option
from qwen_jax.cli.on_hosts import expand_on_hosts
from qwen_jax.cli.profile import profiled
from qwen_jax.config import ConfigError
from qwen_jax.engine.request import MOST_LOGPROBS
from qwen_jax.llm.answer import Answer
from qwen_jax.llm.options import Within


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
    source = prompts.one_of({"--prompt": prompt, "--prompt-file": prompt_file, "--tokens": tokens})
    if logprobs is not None and not json_output:
        raise ConfigError("--logprobs has no effect without --json: add it")
    llm = front(model, model_flags, answer_flags, kv)
    if source != "--tokens":
        _ = llm.tokenizer  # before the text is read
    given = prompts.prompt(prompt, prompt_file, tokens, llm.opened.config.vocab_size)
    options = dataclasses.replace(answer_flags, ignore_eos=ignore_eos, logprobs=logprobs)
    (call,) = llm.calls([given], options)
    if json_output:
        respond(llm, call, lambda text: None, _print_json)
    else:
        respond(llm, call, write, _print_ids)


def _print_ids(done: Answer) -> None:
    """Ends the line of the text; of a model without a tokenizer the ids are on it."""
    print(*(done.token_ids if done.text is None else ()))
    note(done.summary)


def _print_json(done: Answer) -> None:
    logprobs = [{"logprob": each.logprob, "top": each.top} for each in done.logprobs or ()]
    found = {
        "token_ids": done.token_ids,
        "text": done.text,
        "finish": done.finish_reason,
        "timings": done.timings.as_dict(),
        "sparse": done.sparse and dataclasses.asdict(done.sparse),
    }
    print(json.dumps(found if done.logprobs is None else found | {"logprobs": logprobs}))
