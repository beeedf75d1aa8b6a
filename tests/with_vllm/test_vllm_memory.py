"""Peak memory of the vLLM scorer does not grow with what it has scored."""

import sys
from pathlib import Path

import pytest
from peak_memory import peak_bytes, told


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_rollouts(teacher_folder: Path) -> None:
    script = str(Path(__file__).with_name("scoring.py"))
    few, many = (peak_bytes([sys.executable, script, str(teacher_folder), str(count)]) for count in (500, 10_000))
    print(told(few, many))
    assert many / few < 1.05, told(few, many)
