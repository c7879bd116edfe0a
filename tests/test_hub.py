"""The Hub: its client against a server on this machine, its cache without a network, and no token in any word."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import delora
from delora import DeLoRA, LoRA
from tests.cases import shake
from tests.hub_server import Handler, serving

BEGINNING = """
import copy, json, os, sys, traceback
from pathlib import Path
import torch, delora
from torch import nn

def models():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    base.config = type("Config", (), {"_name_or_path": "org/base"})()
    made = []
    for method in (delora.DeLoRA(r=2), delora.LoRA(r=2), delora.RED()):
        model = delora.inject(copy.deepcopy(base), method, ["0"])
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p) if p.requires_grad else 0)
        made.append(model)
    return base, made

def words(call):
    "What is said of an error, and all that its traceback would print."
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error), traceback.format_exc()]
    return ["no error"]

base, (first, second, third) = models()
x, seen = torch.eye(8), {}
same = lambda a, b: torch.equal(a(x), b(x))
fresh = lambda name, **o: delora.load(copy.deepcopy(base), name, **o)
"""
WITH_NETWORK = """
import huggingface_hub
seen["one"] = one = delora.push(first, "me/mine", private=True, data="Reviews", metrics={"accuracy": 0.9})
seen["loaded"] = same(fresh("me/mine"), first)
api = huggingface_hub.HfApi()
card = api.hf_hub_download("me/mine", "README.md")
Path("README.md").write_text(Path(card).read_text() + "My own words.")
api.upload_file(path_or_fileobj="README.md", path_in_repo="README.md", repo_id="me/mine")
seen["two"] = two = delora.push(second, "me/mine", message="Better")
seen["newest"], seen["pinned"] = same(fresh("me/mine"), second), same(fresh("me/mine", revision=one), first)
seen["third"] = delora.push(third, "me/mine", revision="shift")
seen["branch"] = same(fresh("me/mine", revision="shift"), third)
delora.save(first, "saved")
seen["folder"] = delora.push("saved", "me/folder")
seen["from a folder"] = same(fresh("me/folder"), first)
delora.save(third, "me/mine")
seen["a local folder wins"] = same(fresh("me/mine"), third)
seen["a folder's revision"] = words(lambda: fresh("me/mine", revision=one))
seen["missing"] = words(lambda: fresh("me/none"))
seen["missing revision"] = words(lambda: fresh("me/folder", revision="nowhere"))
seen["wrong token"] = words(lambda: delora.push(first, "me/mine", token="another-secret-of-mine"))
seen["no name"] = words(lambda: delora.push(first, "mine"))
seen["no adapter"] = words(lambda: delora.push("nothing here", "me/mine"))
print(json.dumps(seen))
"""
WITHOUT_NETWORK = """
seen["pinned"] = same(fresh("me/mine", revision=sys.argv[1]), first)
seen["newest"] = same(fresh("me/mine"), second)
seen["missing"] = words(lambda: fresh("me/none"))
seen["push"] = words(lambda: delora.push(first, "me/mine"))
print(json.dumps(seen))
"""


COMMANDS = """
import signal
from typer.testing import CliRunner
from delora import cli
from tests.cases import shake
from tests.serving import ask, model, tokenizer

model().save_pretrained("base"), tokenizer().save_pretrained("base")
made = [shake(delora.inject(model(), delora.DeLoRA(r=2), ["q_proj"])) for _ in range(2)]
commits = [delora.push(each, "me/llama") for each in made]
old = f"me/llama@{commits[0]}"
def said(*command):
    done = CliRunner().invoke(cli.app, [str(part) for part in command])
    return f"{done.exit_code} {done.output} {done.exception or ''}"
base, at = ("--model", "base"), ("--model", "base", "--out")
ids = torch.tensor([[3, 5, 7, 9]])
def gives(other, made):
    with torch.no_grad():
        return torch.allclose(other(ids).logits, made(ids).logits, atol=1e-4)
seen["inspect"] = said("inspect", "me/llama")
written = [("export", old, *at, "peft"), ("merge", "me/llama", *at, "whole"), ("convert", old, "new", *base)]
seen["said"] = [said(*command) for command in written]
seen["export"] = gives(delora.load(model(), "peft"), made[0])
seen["merge"] = gives(type(made[0]).from_pretrained("whole"), made[1])
seen["convert"] = gives(delora.load(model(), "new"), made[0])
absent = [("inspect", "me/none"), ("inspect", "me/llama@nowhere"), ("inspect", "none@one"), ("inspect", "base@one")]
seen["missing"] = [said(*command) for command in (*absent, ("merge", "me/none", *at, "other"), ("serve", "me/none", *base))]
names = ["me/llama", f"old={old}"]
command = [sys.executable, "-m", "delora.cli", "serve", *names, *base, "--name", "tiny", "--port", "0"]
import subprocess
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
    seen["serving"] = server.stdout.readline()
    address = seen["serving"].split()[-1].removesuffix("/v1")
    asked = [{"model": name, "prompt": "a", "max_tokens": 1} for name in ("llama", "old")]
    seen["status"] = [ask(address, "/v1/completions", one)[0] for one in asked]
    server.send_signal(signal.SIGINT)
print(json.dumps(seen))
"""


def ran(code, place, *arguments, **env):
    own = {
        "HF_HOME": str(place / "home"),
        "HF_TOKEN": Handler.token,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    own["PYTHONPATH"] = os.pathsep.join(map(str, (Path(delora.__file__).parents[1].resolve(), Path(__file__).parents[1])))
    python = [sys.executable, "-c", BEGINNING + code, *arguments]
    done = subprocess.run(python, env=os.environ | own | env, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stdout + done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What a user saw with a network and, afterwards, without one; and what the server holds."""
    place = tmp_path_factory.mktemp("hub")
    with serving() as (state, address):
        online, printed = ran(WITH_NETWORK, place, HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    (place / "me").rename(place / "not-me")  # the local folder that wins
    offline, more = ran(WITHOUT_NETWORK, place, online["one"], HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    return state, online, offline, printed + more


def test_what_was_pushed_is_loaded_and_a_commit_stays_what_it_was(world):
    state, seen, _, _ = world
    assert state.private == {"me/mine": True, "me/folder": False}
    for check in ("loaded", "newest", "pinned", "branch", "from a folder"):
        assert seen[check] is True, check
    assert len({seen["one"], seen["two"], seen["third"], seen["folder"]}) == 4


def test_a_commit_holds_one_adapter_and_pefts_form_of_it(world):
    state, seen, _, _ = world
    both = {".gitattributes", "README.md", "adapter.json", "adapter_config.json", "adapter_model.safetensors"}
    for commit in ("one", "two"):
        files = state.commits[seen[commit]]
        named = json.loads(files["adapter.json"])["tensors"]["file"]
        assert set(files) == {*both, named}
    assert set(state.commits[seen["third"]]) == {".gitattributes", "README.md", "adapter.json"} | {
        name for name in state.commits[seen["third"]] if name.startswith("adapter-")
    }  # no low-rank change: PEFT's form of the one before is gone


def test_the_card_names_the_repository_and_what_was_told(world):
    state, seen, _, _ = world
    one, two = (state.commits[seen[commit]]["README.md"].decode() for commit in ("one", "two"))
    for words in (
        "Reviews",
        "| accuracy | 0.9 |",
        "delora.load(model, 'me/mine')",
        'library_name: "peft"',
        'base_model: "org/base"',
    ):
        assert words in one
    assert two.endswith("My own words.")
    assert "# A LoRA adapter of org/base" in two
    assert "Reviews" not in two
    third = state.commits[seen["third"]]["README.md"].decode()
    assert 'library_name: "delora"' in third


def test_a_local_folder_of_that_name_wins(world):
    _, seen, _, _ = world
    assert seen["a local folder wins"] is True
    assert seen["a folder's revision"][0] == "ValueError"
    assert "is no repository on the Hub, but a folder, which has no revisions" in seen["a folder's revision"][1]


def test_errors_are_in_words(world):
    _, seen, offline, _ = world
    assert seen["missing"][0] == seen["missing revision"][0] == seen["wrong token"][0] == "HubError"
    assert "there is no folder me/none, and the Hub did not provide such a repository" in seen["missing"][1]
    assert "me/mine was not uploaded" in seen["wrong token"][1]
    assert "repo = 'mine': must be a name such as 'user/name'" in seen["no name"][1]
    assert seen["no adapter"][0] == "AdapterError"
    assert offline["missing"][0] == offline["push"][0] == "HubError"


@pytest.mark.slow
def test_commands_take_a_repository_and_a_revision_of_it(tmp_path):
    with serving() as (_, address):
        seen, printed = ran(COMMANDS, tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert seen["inspect"].startswith("0 ")
    assert "delora(r=2" in seen["inspect"]
    assert [words[0] for words in seen["said"]] == ["0", "0", "0"]
    assert seen["export"] is seen["merge"] is seen["convert"] is True
    assert not any(words.startswith("0") for words in seen["missing"])
    none, revision, no_name, folder, merge, serve = (" ".join(words.split()) for words in seen["missing"])
    assert (
        none.count("the Hub did not provide") == merge.count("the Hub did not provide") == serve.count("the Hub did not") == 1
    )
    assert "nowhere" in revision or "Revision" in revision
    assert "none is no repository on the Hub, whose name is as 'user/name'" in no_name
    assert "base is no repository on the Hub, but a folder" in folder
    assert seen["serving"].startswith("Serving tiny, llama, old at http://")
    assert seen["status"] == [200, 200]
    assert Handler.token not in printed


def test_no_token_is_in_any_word(world):
    """Although the server's answers repeat the token that it was asked with."""
    _, seen, offline, printed = world
    for text in (json.dumps(seen), json.dumps(offline), printed):
        assert Handler.token not in text
        assert "another-secret-of-mine" not in text.replace('token="another-secret-of-mine"', "")
    assert "hf_***" in seen["missing"][1] or "***" in seen["wrong token"][1]


def test_without_a_network_the_cache_is_read(world):
    _, _, offline, _ = world
    assert offline["pinned"] is True
    assert offline["newest"] is True


def test_without_the_hubs_library_a_folder_loads_and_a_name_says_what_to_install(tmp_path):
    code = """
import sys
sys.modules["huggingface_hub"] = None
delora.save(first, "saved")
seen["loaded"] = same(fresh("saved"), first)
seen["words"] = words(lambda: fresh("me/mine"))
print(json.dumps(seen))
"""
    seen, _ = ran(code, tmp_path)
    assert seen["loaded"] is True
    assert 'needs huggingface_hub: pip install "delora[hub]"' in seen["words"][1]


# ---------------------------------------------------------------- transformers reads the export by itself


@pytest.mark.parametrize("method", [DeLoRA(r=2), LoRA(r=2), delora.EtherPlus(blocks=2)], ids=lambda m: type(m).__name__)
@pytest.mark.filterwarnings("ignore")
def test_transformers_load_adapter_reads_our_export(method, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2
    )
    base, x = LlamaForCausalLM(config).eval(), torch.arange(10).reshape(2, 5)
    model = shake(delora.inject(copy.deepcopy(base), method, ["q_proj", "down_proj"])).eval()
    for strength in (0, 0.5, 1, 1.5):
        delora.strength(model, strength)
        theirs = copy.deepcopy(base)
        theirs.load_adapter(str(delora.export.peft(model, tmp_path / str(strength))))
        torch.testing.assert_close(theirs(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)
        assert ((model(x).logits - base(x).logits).abs().max() > 1e-2) == (strength > 0)
        theirs.disable_adapters()
        torch.testing.assert_close(theirs(x).logits, base(x).logits)
