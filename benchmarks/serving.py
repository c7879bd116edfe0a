"""The server under load, with faults thrown in: every answer is checked.

python -m benchmarks.serving            # 10,000 requests from 32 clients; writes the figures into docs/serving.md
python -m benchmarks.serving --requests 500 --dry     # writes nothing

The server is a process of its own, with a tiny random model over bytes (``tests/serving.py``). What is asked for: texts of
every adapter at several strengths, whole and streamed, whose every character is compared with what the model's own
``generate`` gives with that adapter alone; and, among them, requests that are wrong in all the ways that
``tests/test_serving.py`` lists, clients that hang up, prompts at which the model raises or gives NaN, adapters that come and
go, and folders that hold no adapter.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import http.client
import json
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

import delora
from tests.serving import ADAPTERS, model, shelf, tokenizer
from tests.test_serving import BAD, BAD_CHATS

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
RAISES, SPOILS = 37, 41  # tokens
STRENGTHS = (0.5, 1.0, 1.5)
PROMPTS = ["a town by the sea", "once", "def f(x):", "The results of the second year were better than those of"]
TOKENS = 12


def serve(folder: Path) -> None:
    """The server's process: it prints its address."""
    from delora.integrations.engine import Engine
    from delora.integrations.serving import server

    base = model()

    def fault(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if (ids == RAISES).any():
            raise RuntimeError("a fault that was thrown in")
        output.logits[(ids == SPOILS).any(1)] = torch.nan
        return output

    engine = Engine(base, tokenizer(), "base", max_batch=32, shelf=folder)
    for name in ADAPTERS:
        engine.add(name, folder / name)
    base.register_forward_hook(fault, with_kwargs=True)
    server(engine, "127.0.0.1", 0, lambda address: print(address, flush=True)).run()


def expected(folder: Path) -> dict[tuple[str, float, str], str]:
    """What every adapter writes at every strength after every prompt, by the model's own ``generate``."""
    words, texts = tokenizer(), {}
    for name in ["base", *ADAPTERS]:
        made = model()
        if name != "base":
            delora.load(made, folder / name)
        for s in STRENGTHS:
            if name != "base":
                delora.strength(made, s)
            for prompt in PROMPTS:
                ids = torch.tensor([words(prompt)["input_ids"]])
                y = made.eval().generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
                texts[name, s, prompt] = words.decode(y, skip_special_tokens=True)
    return texts


class Client(threading.Thread):
    """One client: sends its share of the requests over one connection, and counts what came of them."""

    def __init__(self, number: int, count: int, host: str, port: int, texts: dict[tuple[str, float, str], str]) -> None:
        super().__init__()
        self.draw, self.number, self.count, self.texts = random.Random(number), number, count, texts
        self.host, self.port = host, port
        self.connection = http.client.HTTPConnection(host, port, timeout=120)
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.times: list[float] = []

    def run(self) -> None:
        kinds = {self.text: 70, self.bad: 14, self.hang_up: 5, self.raises: 2, self.nan: 2, self.come_and_go: 3, self.broken: 4}
        for act in self.draw.choices(list(kinds), list(kinds.values()), k=self.count):
            try:
                self.outcomes[act()] += 1
            except Exception as error:  # counted: the server must never give reason for one
                self.wrong.append(f"{act.__name__}: {type(error).__name__}: {error}")
                self.connection.close()

    def ask(self, path: str, body: Any, method: str = "POST") -> tuple[int, bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent: the answer is there
            self.connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.getheader("Connection") == "close":
            self.connection.close()
        return answer.status, text

    def expect(self, what: str, got: object, wanted: object) -> None:
        if got != wanted:
            self.wrong.append(f"{what}: {got!r} in place of {wanted!r}")

    def body(self) -> tuple[dict[str, Any], str]:
        name, s, prompt = self.draw.choice(list(self.texts))
        body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        return body | ({} if name == "base" else {"strength": s}), self.texts[name, s, prompt]

    def text(self) -> str:
        body, wanted = self.body()
        streamed = self.draw.random() < 0.5
        start = time.perf_counter()
        status, answer = self.ask("/v1/completions", body | {"stream": streamed})
        self.times.append(time.perf_counter() - start)
        self.expect("status", status, 200)
        if streamed:
            lines = [line[6:] for line in answer.decode().split("\n\n") if line]
            self.expect("last", lines[-1], "[DONE]")
            text = "".join(choice["text"] for line in lines[:-1] for choice in json.loads(line)["choices"])
        else:
            text = json.loads(answer)["choices"][0]["text"]
        self.expect("text", text, wanted)
        return "texts, streamed" if streamed else "texts, whole"

    def bad(self) -> str:
        chats = [({"model": "one", **body}, 400, words) for body, words in BAD_CHATS]
        number = self.draw.randrange(len(BAD) + len(chats))
        body, status, words = [*BAD, *chats][number]
        answered, answer = self.ask("/v1/completions" if number < len(BAD) else "/v1/chat/completions", body)
        self.expect("bad request", (answered, words in json.loads(answer)["error"]["message"]), (status, True))
        return "wrong requests"

    def hang_up(self) -> str:
        body = json.dumps(self.body()[0] | {"max_tokens": 400, "stream": self.draw.random() < 0.5}).encode()
        with socket.create_connection((self.host, self.port)) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            connection.sendall((head + body)[: None if self.draw.random() < 0.8 else self.draw.randrange(len(head + body))])
            time.sleep(self.draw.random() / 10)
        return "clients that hung up"

    def raises(self) -> str:
        status, answer = self.ask("/v1/completions", {"model": "one", "prompt": [RAISES, 1], "max_tokens": 3})
        self.expect("the model raised", (status, b"thrown in" in answer), (500, True))
        return "prompts at which the model raised"

    def nan(self) -> str:
        status, answer = self.ask("/v1/completions", {"model": "two", "prompt": [SPOILS, 1], "max_tokens": 3})
        self.expect("NaN", (status, b"NaN" in answer), (500, True))
        return "prompts at which the model gave NaN"

    def come_and_go(self) -> str:
        name, like = f"own{self.number}", self.draw.choice(list(ADAPTERS))
        self.expect("add", self.ask("/v1/adapters", {"name": name, "folder": like})[0], 200)
        prompt = self.draw.choice(PROMPTS)
        body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        status, answer = self.ask("/v1/completions", body)
        self.expect("added", (status, json.loads(answer)["choices"][0]["text"]), (200, self.texts[like, 1.0, prompt]))
        self.expect("drop", self.ask(f"/v1/adapters/{name}", b"", "DELETE")[0], 200)
        self.expect("dropped", self.ask("/v1/completions", body)[0], 404)
        return "adapters added, used, dropped"

    def broken(self) -> str:
        where, status = self.draw.choice([("broken", 400), ("missing", 400), ("../..", 403), ("/etc", 403)])
        self.expect("broken", self.ask("/v1/adapters", {"name": "new", "folder": where})[0], status)
        return "folders without an adapter"


def page(lines: list[str]) -> None:
    before, mark, rest = PAGE.read_text("utf-8").partition("<!-- figures -->\n")
    after = rest.partition("<!-- end of figures -->\n")[2]
    PAGE.write_text("".join([before, mark, "\n".join(lines), "\n<!-- end of figures -->\n", after]), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--dry", action="store_true", help="write no page")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.server is not None:
        serve(options.server)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = shelf(Path(temporary))
        texts = expected(folder)
        command = [sys.executable, "-m", "benchmarks.serving", "--server", temporary]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            address = next(line for line in process.stdout if line.startswith("http")).strip()
            host, port = address.removeprefix("http://").split(":")
            share = options.requests // options.clients
            clients = [Client(i, share, host, int(port), texts) for i in range(options.clients)]
            start = time.perf_counter()
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            seconds = time.perf_counter() - start
            alive = process.poll() is None
            health = json.loads(Client(0, 0, host, int(port), texts).ask("/health", b"", "GET")[1]) if alive else {}
            process.terminate()
    outcomes = sum((client.outcomes for client in clients), collections.Counter())
    wrong = [text for client in clients for text in client.wrong]
    times = [t for client in clients for t in client.times]
    total = sum(outcomes.values())
    cuts = statistics.quantiles(times, n=20)
    lines = [
        f"{total:,} requests from {options.clients} clients in {seconds:.0f} s ({total / seconds:.0f} a second, all in all); "
        f"a text of {TOKENS} tokens came after {cuts[9] * 1000:.0f} ms (median; 95 %: {cuts[18] * 1000:.0f} ms); "
        f"{health.get('batches', 0):,} batches. Answers that were not the expected ones: {len(wrong)}. The server "
        + ("ran on." if alive and health.get("status") == "ok" else "DIED."),
        "",
        "| what was sent | how often |",
        "|---|---|",
        *(f"| {what} | {count:,} |" for what, count in sorted(outcomes.items(), key=lambda pair: -pair[1])),
        "",
        f"A random Llama of 2 layers, {len(ADAPTERS)} adapters and up to {options.clients} more, one process on a shared "
        f"{platform.machine()} CPU, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{datetime.date.today().isoformat()}.",
    ]
    print("\n".join([*lines, *wrong[:10]]))
    if not options.dry:
        page(lines)
    sys.exit(bool(wrong) or not alive)


if __name__ == "__main__":
    main()
