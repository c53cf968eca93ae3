"""What texts of this repository point to is there: pages, anchors, functions, paper sections."""

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHOD = ROOT / "docs" / "method.md"
FOLDERS = ("sparse", "dense", "bridges", "evals", "examples", "benchmarks", "tests", "docs")
PAGE = re.compile(r"[\w/.-]*\b[\w-]+\.md\b(?:#[\w-]+)?")
WRITTEN = {"README.md", "report.md", "study.md", "gpu.md"}  # names of files that the library writes
PAPER = re.compile(
    r"Gao et al\.\s+2025,\s+((?:section|sections|Appendix|Figure|Figures)\s+[A-Z]?[\d.]*\d)"
)
NAME = re.compile(r"`((?:sparse|dense|bridges|evals)\.[\w.]+)`")


def texts(root: Path = ROOT) -> dict[str, str]:
    """Return every text of the repository that may cite, by its path."""
    paths = [p for f in FOLDERS for p in (root / f).rglob("*") if p.suffix in (".py", ".md")]
    paths += root.glob("*.md")
    return {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in sorted(paths)}


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page, flags=re.M)
    kept = (re.sub(r"[^\w\- ]", "", h.replace("`", "")).strip().lower() for h in headings)
    return {h.replace(" ", "-") for h in kept}


def broken_pages(found: dict[str, str], root: Path = ROOT) -> list[str]:
    """Return the citations of a page, or of an anchor in it, that is not there."""
    broken = []
    for path, text in found.items():
        for cited in PAGE.findall(text):
            name, _, anchor = cited.partition("#")
            if name.split("/")[-1] in WRITTEN and not anchor:
                continue
            places = [root / name, (root / path).parent / name]
            page = next((p for p in places if p.is_file()), None)
            if page is None:
                broken.append(f"{path} cites {cited}, and there is no such page")
            elif anchor and anchor not in anchors(page.read_text(encoding="utf-8")):
                broken.append(f"{path} cites {cited}, which has no such heading")
    return broken


def resolves(name: str) -> bool:
    """Say whether a dotted name is a module, or what a module holds."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            if not hasattr(found, part):
                fields = getattr(found, "__dataclass_fields__", {}) or getattr(found, "_fields", ())
                return part in fields and part == parts[-1]
            found = getattr(found, part)
        return True
    return False


def test_every_page_and_anchor_that_is_cited_is_there():
    found = texts()
    found.pop("tests/test_citations.py")  # its planted ones are broken
    assert not (broken := broken_pages(found)), "\n".join(broken)
    assert sum(text.count("docs/method.md#") for text in found.values()) > 40


@pytest.mark.parametrize(
    "cited", ["method.md 2.3", "docs/method.md#no-such-heading", "../shared/facts.md"]
)
def test_control_a_planted_citation_of_what_is_not_there_is_found(cited):
    assert len(broken_pages({"sparse/a.py": f"as in {cited}."})) == 1


def test_every_function_that_a_page_names_is_there():
    names = {
        (path, name)
        for path, text in texts().items()
        if path.endswith(".md") and path != "CHANGELOG.md"  # it names what was, too
        for name in NAME.findall(text)
    }
    broken = [f"{path} names {name}" for path, name in sorted(names) if not resolves(name)]
    assert not broken, "\n".join(broken)
    assert len({name for path, name in names if path == "docs/method.md"}) > 100


@pytest.mark.parametrize("name", ["sparse.pretrain.mode", "sparse.ops.project.missing", "nobody"])
def test_control_a_name_of_what_is_not_there_does_not_resolve(name):
    assert not resolves(name)


def test_every_part_of_the_paper_that_code_cites_is_listed_on_the_page_of_the_method():
    """The paper cannot be opened here, so the list of what is cited of it is kept in one place."""
    listed = places(METHOD.read_text(encoding="utf-8"))
    cited = {
        (path, re.sub(r"\s+", " ", where))
        for path, text in texts().items()
        if path.endswith(".py") and path != "tests/test_citations.py"
        for where in PAPER.findall(text)
    }
    assert len({where for _, where in cited}) >= 3
    missing = [f"{path}: {where}" for path, where in cited if not places(f"| {where} |") <= listed]
    assert not missing, "\n".join(missing)


def places(page: str) -> set[str]:
    """Return the parts of the paper in the first cells of tables: "Figure 9", "section 3.3", ..."""
    found = set()
    for kind, numbers in re.findall(
        r"^\| (section|Appendix|Figure|Table)s? ([^|]+) \|", page, re.M
    ):
        for first, last in re.findall(r"(\w[\w.]*)(?: to (\d+))?", numbers.replace(" and ", ", ")):
            upto = range(int(first), int(last) + 1) if last else [first]
            found |= {f"{kind} {number}" for number in upto}
    return found


def test_control_a_part_that_is_not_listed_is_missed():
    listed = places("| Figures 2, 7 and 27 to 29 | a |\n| section 3.3 | b |")
    assert listed == {"Figure 2", "Figure 7", *(f"Figure {i}" for i in (27, 28, 29)), "section 3.3"}
