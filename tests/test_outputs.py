"The comparison of a notebook's outputs with the committed ones."

import runpy
from pathlib import Path

import pytest

CHECK = runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "check_outputs.py"))


@pytest.mark.parametrize(
    "committed,found,same",
    [
        ("loss 0.71", "loss 0.72", True),  # one unit of the last digit
        ("loss 0.71", "loss 0.73", False),
        ("1.2e-05", "1.3e-05", True),
        ("1.2e-05", "1.4e-05", False),
        ("144 tokens", "145 tokens", False),  # whole numbers are counts
        ("a fox", "an owl", False),
        ("| a | 1.0 |", "| a | 1.0 |\n| b | 2.0 |", False),
        ("", "", True),
        ("[source](a/b.py#L3)", "[source](a/b.py#L9)", True),
    ],
)
def test_numbers_may_differ_in_their_last_digit(committed, found, same):
    assert CHECK["same_text"](committed, found) is same


def test_text_of_outputs():
    text_of = CHECK["text_of"]
    assert text_of(dict(output_type="stream", name="stdout", text=["a\n", "b"])) == "a\nb"
    assert text_of(dict(output_type="stream", name="stderr", text=["10%"])) == ""
    data = {"text/plain": ["<Markdown>"], "text/markdown": ["**a**"]}
    assert text_of(dict(output_type="display_data", data=data)) == "**a**"
    assert (
        text_of(dict(output_type="display_data", data={"image/png": "…", "text/plain": ["<Figure>"]})) == ""
    )


def test_difference_names_the_lines():
    assert CHECK["difference"]("same\nold", "same\nnew").splitlines()[-2:] == ["-old", "+new"]
