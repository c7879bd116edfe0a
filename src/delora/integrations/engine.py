"""The thread that owns a language model and writes what is asked for: any number of adapters, mixed in every batch.

It takes what waits, up to a batch, and runs it by the model's own ``generate`` within `delora.routed`; what comes meanwhile is
the next batch. Adapters are put in and taken out between two batches.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from delora.errors import UserError
from delora.formats.native import load, require_adapter
from delora.injection import eject
from delora.models import adapter_names
from delora.routing import Rows, routed

__all__ = ["Engine", "Job", "Refused"]


class Refused(UserError):
    """A request that cannot be served. ``status`` is HTTP's; ``param`` names the field that is wrong.

    >>> Refused("no model is named 'x'", 404, "model").body()["error"]["type"]
    'invalid_request_error'
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, Any]:
        """The answer, in the form that OpenAI's clients read."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        code = "model_not_found" if self.status == 404 and self.param == "model" else None
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": code}}


# ---------------------------------------------------------------- what is asked for


@dataclass
class Job:
    """One text to write: what comes before it, with which adapter, and how. ``tell`` gets what happens, from another thread.

    >>> parts = []
    >>> job = Job([], None, None, 9, 0.0, 1.0, ["c"], 0, lambda what, value: parts.append(value))
    >>> tokenizer = type("Letters", (), {"decode": lambda self, ids, **_: "".join(map(chr, ids))})()
    >>> for letter in "abcd":
    ...     if not job.done:
    ...         job.push(ord(letter), tokenizer, set())
    >>> parts
    ['a', 'b', 'stop']
    """

    ids: list[int]
    adapter: str | None
    strength: float | None
    max_tokens: int
    temperature: float
    top_p: float
    stop: list[str]
    seed: int
    tell: Callable[[str, Any], None]
    cancelled: bool = False
    done: bool = False
    written: list[int] = field(default_factory=list)  # tokens
    sent: int = 0  # characters
    noise: torch.Generator | None = None

    def push(self, token: int, tokenizer: Any, ends: set[int]) -> None:
        """One more token. Characters are sent as soon as no later token can change them or make them part of a stop."""
        self.written.append(token)
        ended = token in ends
        # After the prompt's last tokens: many tokenizers leave out a space at the beginning of what they decode.
        before = self.ids[-4:]
        whole = tokenizer.decode(before + (self.written[:-1] if ended else self.written), skip_special_tokens=True)
        text = whole[len(tokenizer.decode(before, skip_special_tokens=True)) :]
        at = min((i for stop in self.stop if (i := text.find(stop)) >= 0), default=None)
        if at is not None:
            self.send(text[:at])
            self.finish("stop")
        elif ended or len(self.written) >= self.max_tokens:
            self.send(text)
            self.finish("stop" if ended else "length")
        else:
            held = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            safe = text[: len(text) - held]
            self.send(safe.rstrip("\ufffd"))  # half a character

    def send(self, text: str) -> None:
        """Tell what of the text is new."""
        if len(text) > self.sent:
            self.tell("text", text[self.sent :])
            self.sent = len(text)

    def finish(self, reason: str) -> None:
        """Nothing more comes."""
        if not self.done:
            self.done = True
            self.tell("done", reason)

    def fail(self, error: Refused) -> None:
        """Nothing more comes, because of an error."""
        if not self.done:
            self.done = True
            self.tell("error", error)


class _Steps:
    """What happens to the rows of a batch at each step of ``generate``: tokens are drawn, then told."""

    def __init__(self, jobs: list[Job], engine: Engine) -> None:
        self.jobs, self.engine = jobs, engine

    def draw(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores whose largest is the token drawn: ``s / T - log(-log(u))`` (Gumbel), with random numbers of each row's own.

        So a seed gives the same text in any batch.
        """
        for i, bad in enumerate(scores.isnan().any(-1).tolist()):
            if bad:
                self.jobs[i].fail(Refused("the model gave NaN for this request", 500))
        for i, job in enumerate(self.jobs):
            if job.temperature > 0 and not job.done:
                s = scores[i].float() / job.temperature
                if job.top_p < 1:
                    ordered, order = s.softmax(-1).sort(descending=True)
                    s[order[ordered.cumsum(-1) - ordered >= job.top_p]] = -torch.inf
                if job.noise is None:
                    job.noise = torch.Generator(s.device).manual_seed(job.seed)
                u = torch.rand(s.shape, generator=job.noise, device=s.device).clamp_min(1e-20)
                scores[i] = s - (-u.log()).clamp_min(1e-20).log()
        return scores

    def told(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows are done."""
        for job, token in zip(self.jobs, ids[:, -1].tolist(), strict=True):
            if job.cancelled:
                job.done = True
            elif not self.engine.alive:
                job.fail(Refused("the server is shutting down", 503))
            elif not job.done:
                job.push(token, self.engine.tokenizer, self.engine.ends)
        return torch.tensor([job.done for job in self.jobs], device=ids.device)


# ---------------------------------------------------------------- the thread that owns the model


class Engine:
    """A causal language model, its tokenizer and its adapters, with a thread that runs what is asked for.

    Args:
        model: a base model, or one with adapters; from now on only the engine may use it.
        tokenizer: of transformers.
        name: what requests call the base model.
        max_batch: rows of a batch.
        max_tokens: the most tokens that a request may ask for.
        max_waiting: texts that may wait; more are refused with status 429.
        shelf: the folder from which adapters may be loaded while the server runs. None: they may not, nor be dropped.
        methods: method classes of your own that adapters may use.

    >>> from types import SimpleNamespace
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, eos_token_id=None, **sizes))
    >>> tokenizer = SimpleNamespace(eos_token_id=None, decode=lambda ids, **_: "".join(map(chr, ids)))
    >>> engine, text = Engine(model, tokenizer, "tiny"), []
    >>> engine.submit([Job([1, 2], None, None, 3, 0.0, 1.0, [], 0, lambda what, value: text.append(value))])
    >>> engine.between_batches(lambda: (sum(map(len, text[:-1])), text[-1]))  # after that batch
    (3, 'length')
    >>> engine.stop()
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        name: str,
        *,
        max_batch: int = 16,
        max_tokens: int = 1024,
        max_waiting: int = 256,
        shelf: Path | None = None,
        methods: Iterable[type] = (),
    ) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.max_batch, self.max_tokens, self.max_waiting = max_batch, max_tokens, max_waiting
        self.shelf, self.methods = shelf, tuple(methods)
        config = model.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", 0) or 0)
        self.vocabulary = int(config.vocab_size)
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        ends = ends if ends is not None else tokenizer.eos_token_id
        self.ends = set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
        model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)  # what a request says is all that counts
        self.adapters = adapter_names(model)
        self.reading = threading.Lock()  # a tokenizer is used by one thread at a time
        self.batches = 0
        self._waiting: deque[Job | Callable[[], None]] = deque()
        self._change = threading.Condition()
        self._stopped = False
        self._open = ExitStack()
        self._rows: Rows | None = None
        self._thread = threading.Thread(target=self._run, name="delora-serve", daemon=True)
        self._thread.start()
        for adapter in self.adapters:
            self.between_batches(partial(self._try, adapter))

    # ------------------------------------------------------------ asked for by other threads

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._stopped

    def submit(self, jobs: list[Job]) -> None:
        """Queue texts to write.

        Raises:
            Refused: too many wait already.
        """
        with self._change:
            if self._stopped:
                raise Refused("the server is shutting down", 503)
            if len(self._waiting) + len(jobs) > self.max_waiting:
                raise Refused(f"{len(self._waiting)} texts are waiting already: try again later", 429)
            self._waiting.extend(jobs)
            self._change.notify()

    def between_batches(self, act: Callable[[], Any]) -> Any:
        """Run something in the engine's thread when no batch runs, and wait for it; what it raises is raised here."""
        answer: dict[str, Any] = {}
        ready = threading.Event()

        def run() -> None:
            try:
                answer["result"] = act()
            except BaseException as error:
                answer["error"] = error
            ready.set()

        with self._change:
            if self._stopped:
                raise Refused("the server is shutting down", 503)
            self._waiting.append(run)
            self._change.notify()
        ready.wait()
        if "error" in answer:
            raise answer["error"]
        return answer["result"]

    def add(self, name: str, folder: Path) -> None:
        """Load an adapter from a folder, and try it on two tokens.

        Raises:
            Refused: it cannot be loaded, or not be used in mixed batches; the model is as it was.
        """

        def act() -> None:
            if name == self.name or name in self.adapters:
                raise Refused(f"the name {name!r} is taken: drop that adapter first, or choose another", 409, "name")
            self._close()
            try:
                require_adapter(folder)
                load(self.model, folder, name, methods=self.methods)
                self._try(name)
            except Refused:
                raise
            except (UserError, ValueError, TypeError, OSError) as error:
                self._close()
                if name in adapter_names(self.model):
                    _drop(self.model, name)
                raise Refused(f"cannot load {folder.name!r} as {name!r}: {error}") from error
            self.adapters = [*self.adapters, name]

        self.between_batches(act)

    def drop(self, name: str) -> None:
        """Take an adapter out of the model.

        Raises:
            Refused: there is none of this name.
        """

        def act() -> None:
            self.known(name, adapters_alone=True)
            self._close()
            _drop(self.model, name)
            self.adapters = [other for other in self.adapters if other != name]

        self.between_batches(act)

    def known(self, name: object, adapters_alone: bool = False) -> str | None:
        """The adapter that a request's ``model`` means, or None for the base model.

        Raises:
            Refused: there is none of this name.
        """
        if name == self.name and not adapters_alone:
            return None
        if not isinstance(name, str) or name not in self.adapters:
            there = self.adapters if adapters_alone else [self.name, *self.adapters]
            raise Refused(f"no {'adapter' if adapters_alone else 'model'} is named {name!r}: there are {there}", 404, "model")
        return name

    def stop(self) -> None:
        """End the thread; what waits is refused."""
        with self._change:
            self._stopped = True
            self._change.notify()
        self._thread.join(30)

    # ------------------------------------------------------------ the thread itself

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._waiting and not self._stopped:
                    self._change.wait()
                if self._stopped:
                    left, self._waiting = list(self._waiting), deque()
                    break
                first = self._waiting.popleft()
                batch = [first] if isinstance(first, Job) else []
                while batch and self._waiting and isinstance(self._waiting[0], Job) and len(batch) < self.max_batch:
                    batch.append(cast(Job, self._waiting.popleft()))
            if not isinstance(first, Job):
                first()
            else:
                self._write(batch)
        for item in left:
            if isinstance(item, Job):
                item.fail(Refused("the server is shutting down", 503))
            else:
                item()
        self._close()

    def _write(self, batch: list[Job]) -> None:
        jobs = []
        for job in batch:
            if job.cancelled:
                continue
            if job.adapter is not None and job.adapter not in self.adapters:
                job.fail(Refused(f"the adapter {job.adapter!r} was dropped before this request's turn", 404, "model"))
            else:
                jobs.append(job)
        if not jobs:
            return
        try:
            self._generate(jobs)
        except Exception as error:  # whatever a model may raise, the server goes on
            fresh = [job for job in jobs if not job.done and not job.written]
            if len(jobs) > 1:  # one of them may be at fault: each alone
                for job in fresh:
                    self._write([job])
            else:
                full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
                words = "out of memory: ask for fewer tokens" if full else f"{type(error).__name__}: {error}"
                jobs[0].fail(Refused(f"the model could not write this text: {words}", 503 if full else 500))
            for job in jobs:
                job.fail(Refused("the model failed in the midst of this text", 500))

    @torch.inference_mode()
    def _generate(self, jobs: list[Job]) -> None:
        length = max(len(job.ids) for job in jobs)
        device = self.model.device
        ids = torch.zeros(len(jobs), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, job in enumerate(jobs):
            ids[i, length - len(job.ids) :] = torch.tensor(job.ids)
            mask[i, length - len(job.ids) :] = 1
        self._use([job.adapter for job in jobs], [job.strength for job in jobs])
        steps = _Steps(jobs, self)
        self.batches += 1
        cast(Any, self.model).generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(job.max_tokens for job in jobs),
            logits_processor=LogitsProcessorList([steps.draw]),
            stopping_criteria=StoppingCriteriaList([steps.told]),
        )

    def _use(self, names: list[str | None], strengths: list[float | None] | None = None) -> None:
        if self._rows is None:
            self._rows = self._open.enter_context(routed(self.model, names, strengths))
        else:
            self._rows.use(names, strengths)

    def _try(self, name: str) -> None:
        """One row of two tokens: an adapter that cannot be used in a mixed batch is refused now, not by the first request.

        It also shows each layer which dimension is the batch, before a batch has as many rows as tokens.
        """
        self._use([name])
        with torch.inference_mode():
            self.model(torch.zeros(1, 2, dtype=torch.long, device=self.model.device))

    def _close(self) -> None:
        self._open.close()
        self._rows = None


def _drop(model: Any, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another one has to be activated
        eject(model, name)
