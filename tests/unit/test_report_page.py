"""The HTML page of a report: well-formed, self-contained, honest about what is missing."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import BROWSER, LOOK, tab
from PIL import Image
from test_results_folder import write
from test_results_synthetic import synthetic_record

import report


def made(tmp_path: Path, *names: str) -> Path:
    for name in names:
        write(tmp_path, synthetic_record(60), name)
    return tmp_path


def read(path: Path) -> ElementTree.Element:
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def test_the_page_is_well_formed_self_contained_and_embeds_its_figures(tmp_path: Path) -> None:
    made(tmp_path, "a", "b&<c>")
    assert report.main([str(tmp_path / "a"), str(tmp_path / "b&<c>"), "--out", str(tmp_path / "out")]) == 0
    root = read(tmp_path / "out" / "report.html")
    images = [image.get("src") or "" for image in root.iter("img")]
    assert len(images) == 3 + 2 * 3 and all(source.startswith("data:image/png;base64,iVBOR") for source in images)
    for element in root.iter():
        assert element.tag not in ("script", "link", "iframe", "object")
        for key in ("href", "src"):
            assert (element.get(key) or "data:").startswith("data:")
    text = "".join(root.itertext())
    assert "url(" not in text and "@import" not in text
    assert "b&<c>" in text and "simulated" in text and "Configuration and provenance" in text
    headings = [element.text for element in root.iter() if element.tag in ("h1", "h2")]
    assert headings[0] == "Which system pays here?" and root.find(".//div[@class='answer']") is not None
    assert (tmp_path / "a" / "instances.pdf").exists()


@pytest.mark.parametrize("missing", ["requests.parquet", "timeline.parquet", "manifest.json", "config.yaml"])
def test_a_damaged_folder_is_named_and_the_rest_drawn(
    tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, "a")
    (tmp_path / "a" / missing).unlink()
    assert report.main([str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 3
    assert missing in capsys.readouterr().err
    root = read(tmp_path / "out" / "report.html")
    assert missing in "".join(root.itertext()) and len(list(root.iter("img"))) == 3


def test_garbage_in_a_file_is_damage_and_no_run_at_all_is_an_error(tmp_path: Path) -> None:
    made(tmp_path, "a")
    (tmp_path / "a" / "summary.json").write_text("{")
    (tmp_path / "empty").mkdir()
    out = ["--out", str(tmp_path / "out")]
    assert report.main([str(tmp_path / "a"), str(tmp_path / "empty"), *out]) == 3
    assert report.main([str(tmp_path / "empty"), *out]) == 2


def test_a_folder_of_runs_stands_for_its_runs_and_seeds_are_one_row(tmp_path: Path) -> None:
    made(tmp_path / "sweep", "vllm-s0", "mell-s0")
    assert [path.name for path in report.run_folders(tmp_path / "sweep")] == ["mell-s0", "vllm-s0"]
    assert report.main([str(tmp_path / "sweep"), "--out", str(tmp_path / "out")]) == 0
    rows = [cell.text for cell in read(tmp_path / "out" / "report.html").iter("td")]
    assert "vllm" in rows and "mell" in rows


def test_a_run_of_a_folder_is_never_left_out_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its configuration it is still a run; an empty or failed one is named, and a page beside them is none."""
    made(tmp_path / "sweep", "vllm", "mell", "llumnix")
    (tmp_path / "sweep" / "mell" / "config.yaml").unlink()
    for path in (tmp_path / "sweep" / "llumnix").iterdir():
        path.unlink()
    (tmp_path / "sweep" / "kunserve").mkdir()
    (tmp_path / "sweep" / "kunserve" / "traceback.txt").write_text("ZeroDivisionError")
    assert report.main([str(tmp_path / "sweep"), "--out", str(tmp_path / "sweep" / "page")]) == 3
    err = capsys.readouterr().err
    assert all(words in err for words in ("mell: config.yaml is missing", "llumnix: not a run", "kunserve: not a run"))
    rows = [cell.text for cell in read(tmp_path / "sweep" / "page" / "report.html").iter("td")]
    assert "vllm" in rows and "mell" in rows
    assert [path.name for path in report.run_folders(tmp_path / "sweep")] == ["kunserve", "llumnix", "mell", "vllm"]


def test_seeds_are_one_row_in_the_terminal_and_differences_are_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best of a column is among systems, never among seeds of one."""
    for name, seed, ttft in (("vllm-s0", 0, 10.0), ("vllm-s1", 1, 30.0), ("mell-s0", 0, 20.0), ("mell-s1", 1, 60.0)):
        path = write(tmp_path / "sweep", synthetic_record(60), name)
        for file, change in (("manifest.json", {"seed": seed}), ("summary.json", {"mean_ttft_ms": ttft})):
            tree = json.loads((path / file).read_text())
            (path / file).write_text(json.dumps({**tree, **change}))
    assert report.main([str(tmp_path / "sweep"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out.split("wrote ")[0]
    lines = [line.split()[:2] for line in out.splitlines()]
    assert ["vllm", "20*"] in lines and ["mell", "40"] in lines and "-s0" not in out
    assert "Latency, ms: first token" in out and "mell  +100% [+100, +100]" in out
    root = read(tmp_path / "out" / "report.html")
    assert "Against vllm" in [element.text for element in root.iter("h2")]
    assert "+100% [+100, +100]" in [cell.text for cell in root.iter("td")]


def test_it_fits_a_laptop_and_a_phone_by_its_own_rules(tmp_path: Path) -> None:
    """What a browser would need: a viewport, figures and tables that never push the page wider, no script to fail."""
    made(tmp_path, "a")
    assert report.main([str(tmp_path / "a"), "--out", str(tmp_path)]) == 0
    root = read(tmp_path / "report.html")
    [viewport] = [meta.get("content") or "" for meta in root.iter("meta") if meta.get("name") == "viewport"]
    assert "width=device-width" in viewport
    rules = dict(rule.split("{", 1) for rule in ("".join(root.find("head/style").itertext())).split("}") if "{" in rule)
    rules = {name.strip(): rule.replace("\n", "") for name, rule in rules.items()}
    assert "max-width:100%" in rules["img"] and "max-width" in rules["body"] and "width:" not in rules["table"]
    assert "overflow-x:auto" in rules["table"] and "overflow-x:auto" in rules["pre"]
    assert not list(root.iter("script")) and not [key for node in root.iter() for key in node.attrib if key[:2] == "on"]
    for image in root.iter("img"):
        png = base64.b64decode((image.get("src") or "").split(",", 1)[1])
        width, height = struct.unpack(">II", png[16:24])
        assert png.startswith(b"\x89PNG") and width >= 600 and height >= 200 and image.get("width") is None


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(1366, 768), (390, 844)], ids=["laptop", "phone"])
def test_a_browser_opens_it_and_shows_every_figure(tmp_path: Path, width: int, height: int) -> None:
    made(tmp_path, "a", "b")
    assert report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path)]) == 0
    with tab(tmp_path / "profile") as page:
        page.open((tmp_path / "report.html").as_uri(), width, height, phone=width < 500)
        look = page.value(LOOK)
        page.shot(tmp_path / "shot.png")
    assert page.problems == [], "the page made an error"
    assert [address for address in page.asked if not address.startswith(("file:", "data:"))] == []
    assert look["heading"] == "Which system pays here?" and look["window"] == width
    assert look["page"] <= width, "the page is wider than the window"
    assert len(look["figures"]) == 3 + 2 * 3
    for figure in look["figures"]:
        assert figure["loaded"] and figure["front"], figure
        assert figure["left"] >= 0 and figure["right"] <= width and figure["right"] - figure["left"] > 0.8 * min(
            width, 900), figure  # fmt: skip
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.height > 2 * shot.width, "the shot is of the whole page"
        assert shot.convert("RGB").resize((200, 2000)).getcolors(100) is None, "the shot is nearly blank"


@needs_browser
def test_a_tap_makes_a_figure_large_and_the_page_no_wider(tmp_path: Path) -> None:
    made(tmp_path, "a")
    assert report.main([str(tmp_path / "a"), "--out", str(tmp_path)]) == 0
    with tab(tmp_path / "profile") as page:
        page.open((tmp_path / "report.html").as_uri(), 390, 844, phone=True)
        before = page.value("document.images[0].getBoundingClientRect().width")
        page.value("document.images[0].click()")
        after = page.value("document.images[0].getBoundingClientRect().width")
        assert before < 390 < 800 < after
        assert page.value("document.scrollingElement.scrollWidth") <= 390


@needs_browser
def test_the_browser_would_notice_an_error_a_lost_figure_and_a_load(tmp_path: Path) -> None:
    html = tmp_path / "bad.html"
    html.write_text('<h1>x</h1><img alt="gone" src="gone.png"/><img alt="hidden" style="visibility:hidden" width="9"'
                    ' height="9"/><div style="width:3000px">wide</div><script>undefined_name()</script>')  # fmt: skip
    with tab(tmp_path / "profile") as page:
        page.open(html.as_uri(), 390, 844)
        look = page.value(LOOK)
    assert any("undefined_name" in problem for problem in page.problems)
    assert any(address.endswith("gone.png") for address in page.asked)
    assert look["page"] >= 3000
    gone, hidden = look["figures"]
    assert not gone["loaded"] and not hidden["front"]
