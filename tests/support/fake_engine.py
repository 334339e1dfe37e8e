"""An engine that says what it is told to, at the pace it is told to."""

import signal

from qwen_jax.engine.request import Event, Request


class FakeEngine:
    """Serves one request at a time by the contract of `qwen_jax.engine.engine.Engine`.

    Args:
        answer: the tokens that every answer consists of.
        slice_len: prompt tokens a step.
        interrupt_at: steps before which the user presses Ctrl-C.
        error: what the engine fails with instead of the first token.
    """

    def __init__(self, answer=(), *, slice_len=4, interrupt_at=(), error=None):
        self.answer = tuple(answer)
        self.slice_len = slice_len
        self.interrupt_at = interrupt_at
        self.error = error
        self.requests: list[Request] = []
        self.num_prefilled = 0
        self.num_steps = 0
        self._done = self._given = 0
        self._cancelled = False

    @property
    def busy(self):
        return self._running

    def add(self, request):
        self.requests.append(request)
        self._done = self._given = 0
        self._cancelled, self._running = False, True
        return len(self.requests) - 1

    def cancel(self, request_id):
        assert request_id == len(self.requests) - 1
        self._cancelled = True

    def drop(self, request_ids):
        self._running = self._running and len(self.requests) - 1 not in request_ids

    def step(self):
        if self.num_steps in self.interrupt_at:
            signal.raise_signal(signal.SIGINT)
        self.num_steps += 1
        request = self.requests[-1]
        if self._cancelled:
            return [self._event(finish="cancelled")]
        if self._done < len(request.prompt):
            size = min(self.slice_len, len(request.prompt) - self._done)
            self._done += size
            self.num_prefilled += size
            if self._done < len(request.prompt):
                return [self._event()]
        if self.error is not None:
            return [self._event(finish="error", error=self.error)]
        if self._given == len(self.answer) or self.answer[self._given] in request.eos_ids:
            return [self._event(finish="stop")]
        self._given += 1
        finish = "length" if self._given == request.max_new_tokens else None
        return [self._event(tokens=(self.answer[self._given - 1],), finish=finish)]

    def _event(self, finish=None, **more):
        self._running = finish is None
        number = len(self.requests) - 1
        return Event(request_id=number, prefilled=self._done, finish=finish, **more)
