"""Requests are checked once, where they are made."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from qwen_jax.engine.request import Request, RequestError, Sampling, Sequence

# Where annotations are checked, they refuse a wrong type before the request does.
REFUSED = (RequestError, TypeCheckError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e-9),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", 2**31),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("min_p", float("nan")),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", None),
    ],
)
def test_a_bad_sampling_value_is_refused_by_name(field, value):
    with pytest.raises(REFUSED, match=field):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ()),
        ("prompt", (1, -2)),
        ("prompt", (1, 2**31)),
        ("prompt", (1, 2.0)),
        ("prompt", (True,)),
        ("prompt", [1, 2]),
        ("prompt", "text"),
        ("prompt", 7),
        ("prompt", (1, np.float32(2))),
        ("prompt", (np.True_,)),
        ("prompt", np.array([1.0])),
        ("prompt", np.array([True])),
        ("prompt", np.array([[1, 2]])),
        ("prompt", np.array(3)),
        ("prompt", np.array([], np.int32)),
        ("prompt", np.array([-1])),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("eos_ids", (-1,)),
        ("eos_ids", ("stop",)),
        ("eos_ids", 5),
        ("eos_ids", np.array([0.0])),
        ("eos_ids", (False,)),
    ],
)
def test_a_bad_request_is_refused_by_name(field, value):
    fields = {"prompt": (1, 2), "max_new_tokens": 1, field: value}
    with pytest.raises(REFUSED, match=field):
        Request(**fields)


@pytest.mark.parametrize("kind", [np.int32, np.uint8, np.int64])
@pytest.mark.parametrize("array", [tuple, np.asarray, jnp.asarray])
def test_ids_of_numpy_are_kept_as_integers(array, kind):
    ids = array(np.array([3, 0, 200], kind))
    request = Request(prompt=ids, max_new_tokens=1, eos_ids=ids)
    assert request.prompt == request.eos_ids == (3, 0, 200)
    assert {type(token) for token in request.prompt + request.eos_ids} == {int}


def test_the_extreme_values_are_accepted():
    Sampling(temperature=1e-5, top_k=2**31 - 1, top_p=0, min_p=1, seed=2**32 - 1)
    Sampling(temperature=100, top_k=0, top_p=1, min_p=0, repetition_penalty=0.5)


def test_a_span_runs_from_the_prompt_into_the_answer():
    request = Request(prompt=(10, 11, 12), max_new_tokens=4)
    sequence = Sequence(id=0, request=request, answer=[13, 14, 15])
    for start in range(7):
        for stop in range(start, 7):
            assert sequence.span(start, stop) == (10, 11, 12, 13, 14, 15)[start:stop]
