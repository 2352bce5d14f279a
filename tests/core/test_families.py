"""Every family in the table: exact in float64 on either side of padding and lighter than plain training, or refused."""

import json
import re
from pathlib import Path

import pytest
from families import FAMILIES, Family
from family_check import TOLERANCE, measure

RESULTS = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "results" / "families.json"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"{family.name}-{family.model}")
def test_is_exact_or_refused(family: Family) -> None:
    row = measure(family)
    if family.refused is not None:
        assert "refused" in row, "served: the table is out of date"
        assert re.search(family.refused, row["refused"]), row["refused"]
        return
    assert "refused" not in row, row.get("refused")
    assert row["difference"] <= TOLERANCE
    assert row["bytes_ratio"] < 0.5
    assert row.get("checkpointing_is_exact", True)
    assert row.get("checkpointed_bytes_ratio", 0) < row["bytes_ratio"]
    assert row["verification_seconds"] < 30  # under three on an idle machine


def test_the_committed_table_is_of_these_families() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    assert [(row["family"], row["class"], "refused" in row) for row in rows] == [
        (family.name, family.model, family.refused is not None) for family in FAMILIES
    ]
