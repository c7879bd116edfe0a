"""The documentation's site has every page, and nothing of it leads nowhere."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import delora
from docs.collect import main, pages, relinked

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "build" / "pages"
    main(out)
    return out


def leaves(nav):
    for entry in nav:
        for value in entry.values():
            yield from leaves(value) if isinstance(value, list) else [value]


def test_the_navigation_has_every_page_once(collected):
    nav = list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]))
    assert sorted(nav) == sorted(file.relative_to(collected).as_posix() for file in collected.rglob("*.md"))


def test_every_link_of_a_page_leads_to_a_page(collected):
    for file in collected.rglob("*.md"):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", file.read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s#]+)", text):
            assert target.startswith("http") or (file.parent / target).is_file(), (file.name, target)


def test_links_are_turned_but_for_code():
    shown = {"docs/a.md": "a.md", "paper/docs/b.md": "paper/docs/b.md"}
    text = "![x](../../docs/a.md)\n```\n[x](../../docs/a.md)\n```\n[y](c.py) [z](https://example.org/d.md)"
    assert (
        relinked(text, "paper/docs/b.md", shown)
        == "![x](../../a.md)\n```\n[x](../../docs/a.md)\n```\ny [z](https://example.org/d.md)"
    )
    assert "README.md" in pages()


def test_the_site_builds_without_a_warning(collected):
    """As `make docs` does it, elsewhere: the configuration's paths are those of its folder."""
    place = collected.parent.parent
    shutil.copy(ROOT / "mkdocs.yml", place)  # a link would lead to the repository's own folder
    for name in ("src", "docs"):
        (place / name).symlink_to(ROOT / name)
    command = [Path(sys.executable).parent / "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert delora.strength.__doc__ is not None
    page = html.unescape(re.sub(r"<[^>]*>", "", (place / "site" / "reference" / "models.html").read_text("utf-8")))
    assert delora.strength.__doc__.split("\n")[0].replace("`", "") in page
