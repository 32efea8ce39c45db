"""The programs of the section on attribution run as they stand there."""

from __future__ import annotations

import re

import torch


def test_the_programs_of_the_section_run(checkout, capsys):
    page = (checkout / "docs" / "large" / "attribution.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    programs = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(programs) == 2
    for program in programs:
        exec(compile(program, "page", "exec", dont_inherit=True), names)
    influence, score = names["influence"], names["score"]
    assert influence.shape == (5, 600)
    assert names["harmful"].shape == (10,)
    assert score.score > 0.95
    assert score.noise == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "20 trainings without 12 of 600, 5 metrics" in first
    assert "score -0.9" in second
    assert torch.is_tensor(score.left_out)
