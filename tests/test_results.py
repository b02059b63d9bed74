"""The command in a run's record gives the run again: papermill itself reads back what was given."""
import shlex
from unittest.mock import patch

import papermill.cli
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from avnb.results import command_of

pytestmark = pytest.mark.quick
text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12) | st.sampled_from(["007", "1e3", "None", "True", "null", "no", "~", "2024-01-01", "a b", "it's", "-p", "--", "{x}", "nan", "0x10", "1_000"])
number = st.integers(-10**9, 10**9) | st.floats(allow_nan=False, allow_infinity=False)
plain = st.none() | st.booleans() | number | text
tree = st.recursive(plain, lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x, max_size=3), max_leaves=8)


def heard(command):
    "The parameters that papermill's command line would give to the notebook."
    words = shlex.split(command)
    assert words[0] == "papermill"
    with patch.object(papermill.cli, "execute_notebook") as run: said = CliRunner().invoke(papermill.cli.papermill, words[1:])
    assert said.exit_code == 0, said.output
    return run.call_args.kwargs["parameters"]


def same(x, y):
    "Equal, and of one type: True is not 1."
    if isinstance(x, dict): return isinstance(y, dict) and list(x) == list(y) and all(same(x[k], y[k]) for k in x)
    if isinstance(x, list): return isinstance(y, list) and len(x) == len(y) and all(map(same, x, y))
    return type(x) is type(y) and x == y


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["variant", "data", "name", "steps", "seed", "overrides", "training", "wandb", "quick"]), plain | tree, max_size=6))
def test_papermill_reads_back_what_was_given(parameters):
    wanted = {k: v for k, v in parameters.items() if not (v is None or v is False or v == {})}
    found = heard(command_of(parameters))
    assert found.keys() == wanted.keys() and all(same(wanted[k], found[k]) for k in wanted)
