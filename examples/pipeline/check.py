"""Hold a program against a budget: python check.py REPORT BUDGET

REPORT is what `mobizo inspect PROGRAM --json` prints. BUDGET is JSON from the path of an entry to its value, or to
`{"at_most": number}`; of a list, the sum counts.
"""

import json
import sys
from pathlib import Path
from typing import Any


def violations(report: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    """What the report has otherwise than the budget says.

    >>> violations({"file_bytes": 9, "methods": {"evaluate": {"planned_bytes": [2, 3]}}},
    ...            {"file_bytes": {"at_most": 8}, "methods.evaluate.planned_bytes": {"at_most": 5}})
    ['file_bytes is 9, at most 8 are allowed']
    """
    problems = []
    for path, wanted in budget.items():
        found: Any = report
        for key in path.split("."):
            found = found[key]
        if isinstance(wanted, dict):
            found = sum(found) if isinstance(found, list) else found
            if found > wanted["at_most"]:
                problems.append(f"{path} is {found}, at most {wanted['at_most']} are allowed")
        elif found != wanted:
            problems.append(f"{path} is {found!r}, not {wanted!r}")
    return problems


if __name__ == "__main__":
    report, budget = (json.loads(Path(path).read_text()) for path in sys.argv[1:3])
    problems = violations(report, budget)
    print("\n".join(problems) or f"within budget: {len(budget)} entries")
    sys.exit(1 if problems else 0)
