"""Every command, name and link in the Markdown pages works, and the README keeps its shape."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw
from runs import ROOT

import hccr_jax
from hccr_jax import config as config_lib
from hccr_jax.bench import tables
from hccr_jax.cli import command, config_files

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
# The changelog names what is gone.
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]
GUIDES = [page for page in PAGES if page.name != "CHANGELOG.md"]
CODE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
BLOCK = re.compile(r"<!-- (?:table|stability|curves): .*?<!-- end -->", re.DOTALL)
BENCHMARK = re.compile(r"<!-- benchmark: (.+?) -->\n\n(.*?)\n\n<!-- /benchmark -->", re.DOTALL)
GROUPS = {key.partition(".")[0] for key in config_lib.RULES if "." in key}
FOLDERS = ("configs", "launch", "docs", "hccr_jax", "tests")


def code_blocks(page: Path, language: str) -> list[str]:
    """Returns the fenced blocks of a language on a page."""
    return [body for name, body in CODE.findall(page.read_text("utf-8")) if name == language]


def commands(page: Path) -> Iterator[list[str]]:
    """Yields the words of each command in a page's shell blocks and code spans."""
    lines = [
        line
        for block in code_blocks(page, "sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    spans = re.findall(r"`([^`\n]+)`", CODE.sub("", page.read_text("utf-8")))
    lines += [span for span in spans if re.match(r"(hccr|python -m hccr_jax\S*|launch/\S+) ", span)]
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)  # a variable of the environment
        if words and words[-1] != "…":
            yield words


ALL_COMMANDS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)}")
    for page in GUIDES
    for words in commands(page)
]


def check_command(name: str, flags: list[str]) -> None:
    """Parses the flags of `hccr NAME`, and checks its config, as the command would."""
    values = command.parse(name, flags)
    if name == "sweep" and values.config:
        names = [e.name for e in config_files.list_experiments(values.config)]
        assert set(values.only or ()) <= set(names)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_command_exists_with_its_flags(words: list[str]) -> None:
    program, *arguments = words
    if program == "python" and arguments[:1] == ["-m"]:
        module, *arguments = arguments[1:]
        arguments = ["train", *arguments] if module == "hccr_jax.main" else arguments
        program = "hccr" if module.startswith("hccr_jax") else module
    if program == "hccr":
        name, *arguments = arguments
        if arguments and name != "COMMAND":
            check_command(name, arguments)
        assert name in (*command.COMMANDS, "COMMAND")
    elif program == "sbatch":
        script = next(word for word in arguments if not word.startswith("-"))
        check_script(script, arguments[arguments.index(script) + 1 :])
    elif program.startswith("launch/"):
        check_script(program, arguments)
    else:
        assert program in (".", ".ci/run", "pip", "python3", "pre-commit"), program


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_config_keys_exist(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", CODE.sub("", page.read_text("utf-8")))
    for span in spans:
        if re.match(r"--config\.[a-z]", span):
            command.parse("train", ["--config=hwdb100", span])
        key = span.partition("=")[0]
        group, dot, name = key.partition(".")
        if group in GROUPS and dot and name not in ("py", "json") and "/" not in name:
            assert key in config_lib.RULES, span


def check_script(script: str, arguments: list[str]) -> None:
    """Checks that a launcher exists, and the flags of the training that it starts."""
    assert (ROOT / script).is_file()
    flags = [argument for argument in arguments if argument.startswith("--config")]
    if flags:
        check_command("train", flags)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = BENCHMARK.sub("", BLOCK.sub("", page.read_text("utf-8")))
    text = re.sub(r"https?://\S+", "", text)
    names = re.findall(rf"(?<![\w./])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", text)
    here = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|cc|json|npz))`", text)
    package = [name for name in here if name.split("/")[0] not in FOLDERS]
    missing = {name for name in names if not (ROOT / name).exists()}
    missing |= {name for name in package if not (ROOT / "hccr_jax" / name).exists()}
    assert missing == set()


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = CODE.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_picture_is_shown() -> None:
    shown = "".join(page.read_text("utf-8") for page in PAGES)
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert f"pictures/{picture.name}" in shown


def test_readme_is_a_front_door() -> None:
    text = README.read_text("utf-8")
    assert len(text.split()) <= 750
    assert max(map(len, text.splitlines())) <= 100
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    numerals = re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*(?!\w)", prose)
    assert len(numerals) <= 0.02 * len(prose.split())
    assert not re.search(r"\bseeds? \d|\bcommit\b|\b(?=\d*[a-f])[0-9a-f]{7,40}\b", text)
    # What the first figure was measured on is part of its sentence.
    first = text[text.index("97.88") :]
    assert "100 of the 3,755 characters" in first[: first.index(". ")].replace("\n", " ")


def test_chinese_readme_is_short_and_has_the_same_results() -> None:
    text = (ROOT / "README.zh.md").read_text("utf-8")
    assert len(re.findall(r"[\u4e00-\u9fff]", text)) <= 700
    assert len(text.split()) <= 400
    rows = [re.findall(r"[\d.]+ (?:± [\d.]+ )?%", p) for p in (text, README.read_text("utf-8"))]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_page_is_short(page: Path) -> None:
    text = BENCHMARK.sub("", BLOCK.sub("", page.read_text("utf-8")))
    # A row that names its test is looked up, not read.
    lines = [line for line in text.splitlines() if not re.match(r"\| .*`tests/", line)]
    assert len(" ".join(lines).split()) <= 800


def test_benchmark_tables_are_what_the_measured_rows_give() -> None:
    found = BENCHMARK.findall((ROOT / "docs" / "benchmarks.md").read_text("utf-8"))
    assert found
    for file, table in found:
        assert table == tables.to_markdown(tables.read_results(ROOT / "docs" / file)), file


def test_promises_name_tests_that_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if " test |" not in row]  # not the heads of the tables
    assert len(promises) >= 15
    for line in promises:
        (cell,) = [cell for cell in line.split(" | ") if "`tests/" in cell]
        for file, *parts in re.findall(r"`(tests/[\w/]+\.py)`((?: `?\w+`?,?| \*,?)+)", cell):
            tests = re.findall(r"^ *def (test_\w+)", (ROOT / file).read_text("utf-8"), re.M)
            for part in re.findall(r"`(\w+)`", parts[0]):
                assert any(part in test for test in tests), f"{file}: no test with {part}"


@pytest.fixture
def example_folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder with the runs and pictures that the examples name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("v2", "quickstart"):
        (tmp_path / "runs" / name).symlink_to(finished)
    picture = Image.new("L", (80, 80), 255)
    ImageDraw.Draw(picture).line([(15, 40), (65, 36)], fill=0, width=5)
    for name in ("a.png", "character.png"):
        picture.save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=f"{page.name}-{index}")
        for page in GUIDES
        for index, code in enumerate(code_blocks(page, "python"))
    ],
)
def test_python_examples_run(code: str, example_folder: Path, capsys) -> None:
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(code, "example.py", "exec"), names)
    if "print(" in code:
        assert capsys.readouterr().out
    if "get_config" in names:
        (example_folder / "mine.py").write_text(code)
        config = command.parse("train", ["--config=mine.py"]).config
        assert config.optimizer.learning_rate == 5e-4


def test_the_json_line_of_the_readme_is_what_predict_prints(example_folder: Path, capsys) -> None:
    (example,) = code_blocks(README, "json")
    words = next(words for words in commands(README) if words[:2] == ["hccr", "predict"])
    assert command.main(words[1:]) == 0
    (printed,) = capsys.readouterr().out.splitlines()
    shown, real = json.loads(example), json.loads(printed)
    assert shown["file"] == real["file"]
    assert shown.keys() == real.keys()
    assert [c.keys() for c in shown["candidates"]] == [c.keys() for c in real["candidates"]]


def test_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == hccr_jax.__version__
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    released = re.findall(r"^## \[([\d.]+)\] - (\S+)", changes, re.MULTILINE)
    assert released[0] == (hccr_jax.__version__, str(citation["date-released"]))
