"""The server gives each request what its adapter gives alone, refuses in words, and goes on whatever comes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

import delora
from delora.integrations.engine import Engine, Job, Refused
from tests.serving import ADAPTERS, ask, model, running, shelf, tokenizer

PROMPT = "a town by"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="module")
def engine(folder):
    engine = Engine(model(), tokenizer(), "base", max_batch=8, shelf=folder, max_tokens=1024)
    for name in ADAPTERS:
        engine.add(name, folder / name)
    return engine


@pytest.fixture(scope="module")
def address(engine):
    with running(engine) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def alone(folder, name, prompt, strength=1.0, max_tokens=12):
    """The likeliest tokens by the model's own generate, with one adapter, and no server."""
    made, words = model(), tokenizer()
    if name != "base":
        delora.load(made, folder / name)
        delora.strength(made, strength)
    ids = torch.tensor([words(prompt)["input_ids"]])
    y = made.eval().generate(ids, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return words.decode(y, skip_special_tokens=True)


# ---------------------------------------------------------------- what is answered


def test_each_request_gets_what_its_adapter_gives_alone(engine, client, folder):
    cases = [(name, s, PROMPT + " x" * i) for i, name in enumerate(["base", *ADAPTERS]) for s in (1.0, 0.5, 0.0, 1.5)]
    cases = [case for case in cases if case[0] != "base" or case[1] == 1.0]

    def request(case):
        name, strength, prompt = case
        more = {} if name == "base" else {"strength": strength}
        answer = client.completions.create(model=name, prompt=prompt, temperature=0, max_tokens=12, extra_body=more)
        return answer.choices[0].text

    before = engine.batches
    with ThreadPoolExecutor(len(cases)) as pool:
        texts = list(pool.map(request, cases))
    assert engine.batches - before < len(cases)  # they were mixed
    expected = [alone(folder, name, prompt, strength) for name, strength, prompt in cases]
    assert texts == expected
    assert len(set(texts)) > 6


def test_models_are_listed(client):
    assert [m.id for m in client.models.list()] == ["base", *ADAPTERS]
    assert client.models.retrieve("one").id == "one"


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_stream_is_the_whole_answer(client, temperature):
    options = dict(model="one", prompt=[PROMPT, "b"], n=2, max_tokens=20, temperature=temperature, top_p=0.9, seed=3)
    whole = client.completions.create(**options)
    parts = ["" for _ in whole.choices]
    reasons = {}
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert parts == [choice.text for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunk.usage == whole.usage
    assert whole.usage.prompt_tokens == len(PROMPT) + 1
    assert (parts[0] == parts[1]) == (temperature == 0)


def test_chat_is_a_completion_of_the_template(client):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    options = dict(model="two", temperature=0, max_tokens=9)
    chat = client.chat.completions.create(messages=messages, **options).choices[0]
    plain = client.completions.create(prompt="system: be brief\nuser: hello\nassistant:", **options).choices[0]
    assert chat.message.content == plain.text
    stream = client.chat.completions.create(messages=messages, **options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == plain.text


def test_a_seed_gives_the_same_text_in_any_batch(client):
    def request(seed):
        return client.completions.create(model="one", prompt=PROMPT, max_tokens=8, seed=seed).choices[0].text

    one_by_one = [request(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(request, range(6))) == one_by_one
    assert len(set(one_by_one)) > 1


def test_a_stop_ends_the_text(client):
    options = dict(model="base", prompt=PROMPT, temperature=0, max_tokens=24)
    text = client.completions.create(**options).choices[0].text
    middle = text[len(text) // 2 : len(text) // 2 + 2]
    choice = client.completions.create(**options, stop=[middle, "never"]).choices[0]
    assert choice.text == text[: text.index(middle)]
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("stop", [[], ["b"], ["ab"], ["€x"], ["a€", "€xa"]])
def test_what_is_sent_is_the_text_up_to_the_stop(stop):
    """Character by character, halves of characters too."""
    words, text = tokenizer(), "xyab€xa€€b ab"
    sent, state = [], []
    job = Job(
        [1, 2], None, None, 1000, 0.0, 1.0, stop, 0, lambda what, value: (sent if what == "text" else state).append(value)
    )
    for token in [*words(text)["input_ids"], 256]:
        if not job.done:
            job.push(token, words, {256})
    at = min((text.index(s) for s in stop if s in text), default=len(text))
    assert "".join(sent) == text[:at]
    assert state == ["stop"]
    assert all("\ufffd" not in part for part in sent)


# ---------------------------------------------------------------- what is refused

OK = {"model": "one", "prompt": PROMPT, "max_tokens": 2}
BAD = [
    (b"{", 400, "no JSON"),
    (b"[" * 100_000, 400, "no JSON"),
    (b'{"model": NaN}', 400, "NaN is no number of JSON"),
    (b"\xff\xfe", 400, "no JSON"),
    (b"[]", 400, "expected a JSON object"),
    (b'"' + b"x" * 2_000_000 + b'"', 413, "longer than"),
    ({**OK, "model": "four"}, 404, "no model is named 'four': there are ['base', 'one'"),
    ({**OK, "model": ["one"]}, 404, "no model is named"),
    ({"prompt": PROMPT}, 400, "the field 'model' is missing"),
    ({"model": "one"}, 400, "prompt = None"),
    ({**OK, "prompt": ""}, 400, "no tokens"),
    ({**OK, "prompt": {}}, 400, "must be a text"),
    ({**OK, "prompt": [1, 999]}, 400, "there is no token 999"),
    ({**OK, "prompt": [1, 10**400]}, 400, "there is no token"),
    ({**OK, "prompt": "\ud800"}, 400, "lone surrogate"),
    ({**OK, "prompt": "x" * 3000}, 400, "the prompt has 3000 tokens"),
    ({**OK, "prompt": "x" * 2000, "max_tokens": 1000}, 400, "more than the 2048 that fit"),
    ({**OK, "prompt": ["a"] * 65}, 400, "may ask for 64"),
    ({**OK, "max_tokens": 0}, 400, "an integer from 1 to 1024"),
    ({**OK, "max_tokens": 1e9}, 400, "an integer from 1 to 1024"),
    ({**OK, "temperature": -1}, 400, "a number from 0 to 100"),
    ({**OK, "temperature": "hot"}, 400, "a number from 0 to 100"),
    ({**OK, "top_p": 1.1}, 400, "a number from 0 to 1"),
    ({**OK, "n": 65}, 400, "an integer from 1 to 64"),
    ({**OK, "stop": [""]}, 400, "none of them empty"),
    ({**OK, "stop": ["\ud800"]}, 400, "lone surrogate"),
    ({**OK, "stream": 1}, 400, "must be true or false"),
    ({**OK, "stream_options": {"x": 1}}, 400, "include_usage"),
    ({**OK, "seed": 0.5}, 400, "an integer of 64 bits"),
    ({**OK, "strength": -1}, 400, "a number from 0 to"),
    ({**OK, "strength": "1"}, 400, "a number from 0 to"),
    ({**OK, "model": "base", "strength": 1}, 400, "'base' is the base model"),
    ({**OK, "strenght": 1}, 400, "there is no field 'strenght'"),
    ({**OK, "logprobs": 5}, 400, "does not support logprobs"),
    ({**OK, "echo": True}, 400, "does not support echo"),
]
BAD_CHATS = [
    ({}, "messages = None"),
    ({"messages": []}, "must be a list of messages"),
    ({"messages": ["hello"]}, "must have a role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "must have a role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type 'text' only"),
    ({"messages": [{"role": "user"}]}, "content = None: must be a text"),
    ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "does not support tools"),
]


def test_bad_requests_are_refused_in_words_and_the_server_goes_on(address):
    for body, status, words in BAD:
        answered, answer = ask(address, "/v1/completions", body)
        assert (answered, words in answer["error"]["message"]) == (status, True), answer
    for body, words in BAD_CHATS:
        answered, answer = ask(address, "/v1/chat/completions", {"model": "one", **body})
        assert (answered, words in answer["error"]["message"]) == (400, True), answer
    for path, method, status in (("/v1/nothing", "POST", 404), ("/v1/completions", "GET", 405), ("/v1/models/x", "GET", 404)):
        answered, answer = ask(address, path, None if method == "GET" else OK, method)
        assert answered == status
        assert answer["error"]["message"]
    assert ask(address, "/v1/completions", OK)[0] == 200
    assert ask(address, "/health")[1]["status"] == "ok"


def test_defaults_that_clients_send_are_no_reason_to_refuse(address):
    harmless = {"frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": None, "echo": False, "best_of": 1, "user": "me"}
    assert ask(address, "/v1/completions", {**OK, **harmless})[0] == 200


def test_a_model_without_a_chat_template_says_so():
    words = tokenizer()
    words.chat_template = None
    with running(Engine(model(), words, "base")) as address:
        status, answer = ask(address, "/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "x"}]})
        assert (status, "use /v1/completions" in answer["error"]["message"]) == (400, True)
        status, answer = ask(address, "/v1/adapters", {"name": "one", "folder": "one"})
        assert (status, "--shelf" in answer["error"]["message"]) == (403, True)


# ---------------------------------------------------------------- adapters come and go


def test_adapters_are_added_and_dropped_while_it_runs(engine, address, folder):
    expected = alone(folder, "one", PROMPT)
    stop = threading.Event()
    seen = []

    def others():
        while not stop.is_set():
            body = {"model": "one", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
            seen.append(ask(address, "/v1/completions", body)[1]["choices"][0]["text"])

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(3):
            assert ask(address, "/v1/adapters", {"name": "new", "folder": "two"})[0] == 200
            assert ask(address, "/v1/adapters", {"name": "new", "folder": "two"})[0] == 409
            body = {"model": "new", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
            assert ask(address, "/v1/completions", body)[1]["choices"][0]["text"] == alone(folder, "two", PROMPT)
            assert ask(address, "/v1/adapters/new", method="DELETE")[0] == 200
            assert ask(address, "/v1/completions", body)[0] == 404
            assert ask(address, "/v1/adapters/new", method="DELETE")[0] == 404
        for name, where, status, words in (
            ("new", "broken", 400, "cannot load 'broken' as 'new'"),
            ("new", "missing", 400, "there is no folder"),
            ("new", "../" + folder.name + "x", 403, "must be in the folder of --shelf"),
            ("new", "/etc", 403, "must be in the folder of --shelf"),
            ("new", 1, 400, "must be a text"),
            ("a b", "one", 400, "made of letters"),
            ("keys", "one", 400, "no attribute of nn.ModuleDict"),
            ("base", "one", 409, "is taken"),
        ):
            answered, answer = ask(address, "/v1/adapters", {"name": name, "folder": where})
            assert (answered, words in answer["error"]["message"]) == (status, True), answer
        assert ask(address, "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "two"})[0] == 200
        assert ask(address, "/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 200
    finally:
        stop.set()
        thread.join()
    assert seen
    assert set(seen) == {expected}
    assert engine.adapters == list(ADAPTERS)


# ---------------------------------------------------------------- faults


def test_a_request_that_breaks_the_model_is_answered_and_the_others_are_served(engine, address):
    """A batch with one request for which the model raises: that one alone gets an error."""

    def break_on(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and (ids == 37).any():
            raise RuntimeError("the forward broke")

    handle = engine.model.register_forward_pre_hook(break_on, with_kwargs=True)
    try:
        bodies = [{**OK, "prompt": [37 if i == 3 else i, 5], "temperature": 0} for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda body: ask(address, "/v1/completions", body), bodies))
    finally:
        handle.remove()
    assert [status for status, _ in answers] == [500 if i == 3 else 200 for i in range(8)]
    assert "the forward broke" in answers[3][1]["error"]["message"]


def test_nan_is_an_error_of_its_row(engine, address):
    def spoil(module, args, kwargs, output):
        ids = kwargs.get("input_ids")
        output.logits[(ids == 41).any(1)] = torch.nan
        return output

    handle = engine.model.register_forward_hook(spoil, with_kwargs=True)
    try:
        status, answer = ask(address, "/v1/completions", {**OK, "prompt": [[41, 1], [5, 6]]})
        assert (status, "NaN" in answer["error"]["message"]) == (500, True)
        assert ask(address, "/v1/completions", {**OK, "prompt": [[5, 6]]})[0] == 200
    finally:
        handle.remove()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_is_not_written_for(engine, address, stream):
    count = []
    handle = engine.model.register_forward_hook(lambda *_: count.append(1))
    body = json.dumps({**OK, "max_tokens": 1000, "stream": stream, "seed": 1}).encode()
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        while not count:
            pass
    assert ask(address, "/v1/completions", OK)[0] == 200  # its turn comes when that batch is over
    handle.remove()
    assert len(count) < 900


def test_too_many_waiting_are_refused():
    engine = Engine(model(), tokenizer(), "base", max_waiting=2)
    hold, held = threading.Event(), threading.Event()

    def block():
        held.set()
        hold.wait()

    thread = threading.Thread(target=engine.between_batches, args=(block,))
    with running(engine) as address:
        thread.start()
        held.wait()
        status, answer = ask(address, "/v1/completions", {"model": "base", "prompt": ["a"] * 3, "max_tokens": 1})
        hold.set()
        thread.join()
        assert (status, "try again later" in answer["error"]["message"]) == (429, True)
        assert ask(address, "/v1/completions", {"model": "base", "prompt": ["a"] * 2, "max_tokens": 1})[0] == 200
    with pytest.raises(Refused, match="shutting down"):
        engine.submit([])


def test_the_command_serves(folder, tmp_path):
    model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    names = [f"mine={folder / 'one'}", str(folder / "three")]
    command = [sys.executable, "-m", "delora.cli", "serve", *names, "--model", str(tmp_path), "--name", "tiny", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            assert line.startswith("Serving tiny, mine, three at http://127.0.0.1:")
            address = line.split()[-1].removesuffix("/v1")
            body = {"model": "mine", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
            assert ask(address, "/v1/completions", body)[1]["choices"][0]["text"] == alone(folder, "one", PROMPT)
        finally:
            server.send_signal(signal.SIGINT)
    assert server.returncode in (0, 130, -signal.SIGINT)  # interrupted, and nothing else


def test_the_command_refuses_in_words(folder, tmp_path):
    from typer.testing import CliRunner

    from delora.cli import app

    def words(*arguments):
        result = CliRunner().invoke(app, ["serve", *arguments, "--model", str(tmp_path)])
        assert result.exit_code
        return " ".join(f"{result.output} {result.exception}".replace("│", " ").split())  # a box may break a line anywhere

    assert "there is no folder" in words(str(folder / "missing"))
    assert "two adapters are called" in words(f"one={folder / 'two'}", str(folder / "one"))
    assert "no such folder" in words("--shelf", str(folder / "missing"))
