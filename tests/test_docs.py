"""Every Python snippet of README and docs runs as printed and prints what the page says, and links lead somewhere. Those of
hub.md run in tests/test_hub.py."""

import ast
import importlib
import re
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"bitsandbytes": ("bitsandbytes", "BitsAndBytes"), "trl": ("from trl",)}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fenced(page, language):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [body for found, body in blocks if found == language]


def snippets(page):
    return fenced(page, "python")


RUN_HERE = [page for page in PAGES if snippets(page) and page.name != "hub.md"]


def shown_output(page):
    return fenced(page, "")


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'allora_eta'")
@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.name)
def test_a_pages_snippets_run_one_after_the_other(page, tmp_path, monkeypatch, capsys):
    for package, words in NEEDS.items():
        if any(word in snippet for word in words for snippet in snippets(page)):
            pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "snippet"}
    for number, snippet in enumerate(snippets(page)):
        exec(compile(snippet, f"{page.name}, snippet {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    for output in shown_output(page):
        assert output.strip() in printed


def test_the_readme_has_its_example():
    assert len(snippets(ROOT / "README.md")) == 4


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def gpu_tests():
    """Whether each test that ever ran on a GPU passed when it last did, by its name and parameters."""
    passed = {}
    for folder in ("steps-h200", "steps-hopper"):  # in the order of the days
        for line in (ROOT / "bench" / "results" / folder / "gpu-tests.txt").read_text().splitlines():
            if found := re.fullmatch(r"((?:\d+[pf] )+)(tests/.*)", line):
                passed[found[2]] = found[1].endswith("p ")
    return passed


def test_the_readme_counts_the_gpu_tests_as_the_records_do():
    passed = list(gpu_tests().values())
    said = f"{len(passed):,} GPU tests over two days, of which {sum(passed):,} passed; the {passed.count(False)} that failed"
    assert said in (ROOT / "README.md").read_text()


def test_each_row_of_the_matrix_names_a_test_that_exists():
    ran = {name.partition("[")[0] for name, passed in gpu_tests().items() if passed}
    page = ROOT / "docs" / "compatibility.md"
    rows = re.findall(r"^\| (.+) \| (.*) \| (.*) \|$", page.read_text(), re.MULTILINE)
    rows = [row for row in rows if row[0] not in ("Feature", "---")]
    assert len(rows) > 20
    for feature, verdict, test in rows:
        assert verdict.startswith(("works", "refused: ")), feature
        file, name = re.fullmatch(r"\[.+\]\((.+)\) `(\w+)`", test).groups()
        assert f"\ndef {name}(" in (page.parent / file).read_text(), f"{feature}: {file} has no {name}"
        on_a_gpu = "/gpu/" in file
        assert on_a_gpu == (verdict == "works on a GPU"), feature
        assert not on_a_gpu or f"{file.removeprefix('../')}::{name}" in ran, f"{feature}: has not passed on a GPU"


def test_the_reference_has_the_public_names_and_no_others():
    """A section for each module that users import from: its `__all__`, each by the path where it is defined, or all of it."""
    text = (ROOT / "docs" / "reference.md").read_text()
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    found = {name: re.findall(r"^::: (\S+)$", body, re.MULTILINE) for name, body in sections.items()}
    package = ROOT / "allora_kernels"
    integrations = [p.stem for p in (package / "integrations").iterdir() if not p.stem.startswith("_")]
    public = ["per_sample", "training", "reference", *(f"integrations.{name}" for name in integrations)]
    expected = {}
    for name in ("allora_kernels", *(f"allora_kernels.{name}" for name in public)):
        module = importlib.import_module(name)
        objects = [getattr(module, n) for n in getattr(module, "__all__", ())]
        defined = [f"{o.__module__}.{o.__qualname__}" for o in objects if not isinstance(o, types.ModuleType)]
        expected[name] = sorted(defined or [name])
    assert {name: sorted(paths) for name, paths in found.items()} == expected


def message_patterns(page):
    """The quoted messages, each as a pattern in which ``...`` is anything."""
    for message in re.findall(r"^### `(.*)`$", page.read_text(), re.MULTILINE):
        yield message, re.compile(".*".join(re.escape(part) for part in message.split("...")), re.DOTALL)


def texts_of_messages():
    """What the package raises or warns, or a report gives as a reason, with ``{}`` for what is filled in."""
    for path in (ROOT / "allora_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            warns = isinstance(call, ast.Call) and getattr(call.func, "attr", None) == "warn"
            if isinstance(node, ast.Return) and isinstance(node.value, (ast.JoinedStr, ast.Constant)):
                text = node.value
            elif isinstance(call, ast.Call) and call.args and (isinstance(node, ast.Raise) or warns):
                text = call.args[0]
            else:
                continue
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)


def test_every_message_of_troubleshooting_is_in_the_source():
    quoted = list(message_patterns(ROOT / "docs" / "troubleshooting.md"))
    texts = list(texts_of_messages())
    assert quoted
    assert not [message for message, pattern in quoted if not any(pattern.search(text) for text in texts)]
