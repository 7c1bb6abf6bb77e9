"""The table of faults, from what their tests noted: python table.py FAULTS.xml [README.md].

Prints it; with a Markdown file, writes it there between <!-- faults --> and <!-- /faults -->.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree

Row = tuple[str, str, str]


def rows(report: Path) -> list[Row]:
    """Fault, outcome and what the user reads, of each test that noted one and passed."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        noted = {p.get("name"): p.get("value") or "" for p in case.iter("property")}
        failed = case.find("failure") is not None or case.find("error") is not None
        if "fault" in noted:
            outcome = "FAILED" if failed else noted["outcome"]
            found.append((noted["fault"], outcome, noted.get("said", "")))
    return found


def markdown(found: list[Row], longest: int = 160) -> str:
    """A table; a sentence longer than `longest` characters is cut."""
    lines = ["| fault | what becomes of it | what you read |", "| --- | --- | --- |"]
    for fault, outcome, said in found:
        text = said.removeprefix("gemmate: ").replace("|", "\\|").replace("<", "&lt;")
        cut = text if len(text) <= longest else f"{text[:longest].rsplit(' ', 1)[0]} …"
        lines.append(f"| {fault} | {outcome} | {cut} |")
    return "\n".join(lines)


def main(report: str, readme: str | None = None) -> int:
    """Print the table, write it, and end with 1 where a fault was not survived."""
    found = rows(Path(report))
    table = markdown(found)
    print(table)
    if readme:
        whole = Path(readme).read_text("utf-8")
        before, _, rest = whole.partition("<!-- faults -->\n")
        after = rest.partition("<!-- /faults -->")[2]
        folded = f"<details>\n<summary>{len(found)} faults</summary>\n\n{table}\n\n</details>"
        Path(readme).write_text(
            f"{before}<!-- faults -->\n{folded}\n<!-- /faults -->{after}", encoding="utf-8"
        )
    return 1 if any(outcome == "FAILED" for _, outcome, _ in found) else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
