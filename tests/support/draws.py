"""How tests draw examples: the same every time, however long one takes."""

import functools

from hypothesis import HealthCheck, settings

drawn_alike = functools.partial(
    settings,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
"""Settings of tests in classes that others inherit."""


def machine(rules, max_examples, steps):
    """The test case of a machine of rules."""
    case = rules.TestCase
    case.settings = settings(
        max_examples=max_examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    return case
