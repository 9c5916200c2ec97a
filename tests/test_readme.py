"""The README's examples run as they stand, and its test command is the one CI runs."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.usefixtures("quickly_compiled")
README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=[f"example {i}" for i in range(len(EXAMPLES))])
def test_an_example_of_the_readme_runs_and_prints(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert (said := capsys.readouterr().out).strip()
    for a, sign, b, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", said):
        assert int(a) + int(sign + b) == int(result)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12


def test_there_are_examples_and_one_test_command():
    assert len(EXAMPLES) >= 5
    assert README.count("-m pytest") == 1
