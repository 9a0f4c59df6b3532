"""docs/train_from_scratch.md, every block of it, in the order in which it stands."""

import re
import shlex
from pathlib import Path

from fastattn.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "train_from_scratch.md"


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in blocks} == {"python", "bash"} and len(blocks) >= 8
    namespace: dict = {}
    for kind, block in blocks:
        capsys.readouterr()
        if kind == "bash":
            for command in block.splitlines():
                program, *arguments = shlex.split(command)
                assert program == "fastattn"
                assert main(arguments) == 0, f"{command}\n{capsys.readouterr().err}"
        else:
            exec(compile(block, PAGE.name, "exec"), namespace)
            promised = re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
            assert capsys.readouterr().out.splitlines() == promised
