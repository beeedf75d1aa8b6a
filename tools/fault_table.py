"""Runs every fault test and prints a table: what was done to a run, how often, and how it ended.

python tools/fault_table.py            every fault (FAULTS=full): hours on two cores
python tools/fault_table.py --ci       the set that represents them, as the tests' own run has it
python tools/fault_table.py --write    docs/fault-table.md too
python tools/fault_table.py --log DIR tests/faults/test_kills.py    a part; of what DIR holds by then the table is made
Further arguments go to pytest; --log DIR --no-tests only makes the table. A fault that was tried again counts once, as it
ended last. Exit status 1 when any fault was not survived.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs" / "fault-table.md"
# Outcomes of tests/fault_log.py, and their columns.
COLUMNS = {"survived": "survived", "lost": "data lost", "silent": "silent errors", "failed": "other failures"}
Table = dict[str, Counter[str]]  # outcomes by row


def run_tests(log: Path, is_full: bool, arguments: list[str]) -> int:
    environment = {**os.environ, "FAULT_LOG": str(log), "FAULTS": "full" if is_full else ""}
    # Two at a time; the tests of a file share what is expensive to make.
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", *arguments]
    if not any(argument.startswith("tests/") for argument in arguments):
        command += ["tests/faults", "tests/doors"]
    return subprocess.run(command, env=environment, cwd=REPOSITORY, stdout=sys.stderr).returncode


def read_log(log: Path) -> Table:
    lines = (line for path in log.glob("*.jsonl") for line in path.read_text(encoding="utf-8").splitlines())
    entries = sorted(map(json.loads, lines), key=lambda entry: entry["time"])
    ends = {(entry["row"], entry["fault"]): entry["outcome"] for entry in entries}
    table: Table = {}
    for (row, _), outcome in ends.items():
        table.setdefault(row, Counter())[outcome] += 1
    return dict(sorted(table.items()))


def markdown(table: Table) -> str:
    rows = [["fault", "tried", *COLUMNS.values()]]
    rows += [[name, *_numbers(counts)] for name, counts in table.items()]
    rows.append(["**all**", *(f"**{number}**" for number in _numbers(_total(table)))])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(COLUMNS) + 1))
    return "\n".join(lines) + "\n"


def _numbers(counts: Counter[str]) -> list[str]:
    return [f"{number:,}" for number in (counts.total(), *(counts[outcome] for outcome in COLUMNS))]


def _total(table: Table) -> Counter[str]:
    return sum(table.values(), Counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ci", action="store_true", help="only a set that represents all faults")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--write", action="store_true", help=f"also write {PAGE.relative_to(REPOSITORY)}")
    parser.add_argument("--log", type=Path, metavar="DIR", help="keep what happened here, beside what is there")
    parser.add_argument("--no-tests", action="store_true", help="only read --log")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.log or Path(name)
        folder.mkdir(exist_ok=True)
        status = 0 if options.no_tests else run_tests(folder, not options.ci, arguments)
        table = read_log(folder)
    text = markdown(table)
    print(json.dumps({"rows": table, "all": _total(table)}, indent=2) if options.json else text, end="\n")
    if options.write:
        PAGE.write_text(_page(text), encoding="utf-8")
    total = _total(table)
    sys.exit(int(status != 0 or total["survived"] != total.total() or not total))


def _page(table: str) -> str:
    return f"""# Faults, and how runs survive them

Each fault is done to a real run of tiny models, and judged by `tests/faults/oracle.py`: the exit status and the one line
are as documented, nothing published has changed, `opd-cache verify` names exactly the damage, and the same command then
ends with the bytes of an undisturbed run, every row once and no temporary file left. Made by
`python tools/fault_table.py`, some rows with every fault and others with the set that represents them (`--ci`): the number
in a row says how many.

{table}"""


if __name__ == "__main__":
    main()
