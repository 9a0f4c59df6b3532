"""Settings from TOML files: they become flags, flags override them, and errors name the file and the key."""

import argparse
from pathlib import Path

import pytest

from fastattn.cli import config, main, make_parser
from fastattn.cli.flags import Flag, add_flags, given, with_defaults
from fastattn.errors import DataError, InputError

FLAGS = (
    Flag("--steps", "steps", int, 10, "steps"),
    Flag("--lr", "lr", float, 0.1, "rate"),
    Flag("--best", "best", bool, False, "switch"),
    Flag("--kind", "kind", str, "a", "kind", ("a", "b")),
)


@pytest.fixture
def parse(tmp_path):
    """Parses ``make --config <text> <more flags>`` with a small set of flags."""

    def parse(text, *more, files=()):
        parser = argparse.ArgumentParser()
        commands = parser.add_subparsers(dest="command")
        make, other = commands.add_parser("make"), commands.add_parser("other")
        add_flags(make, FLAGS)
        make.add_argument("--out", type=Path, required=True)
        make.add_argument("--data", nargs="+", default=argparse.SUPPRESS)
        make.add_argument("--name", action="append", default=argparse.SUPPRESS)
        make.add_argument("--quiet", action="store_true")
        for command in (make, other):
            config.add_flag(command)
        path = tmp_path / "settings.toml"
        path.write_text(text)
        argv = ["make", "--config", str(path), *(f"--config={file}" for file in files), *more]
        return parser.parse_args(config.expand(argv, commands.choices))

    return parse


def test_keys_are_flags(parse):
    text = 'steps = 5\nlr = 1\nbest = true\nkind = "b"\nout = "somewhere"\n'
    args = parse(text + 'data = ["x", "y"]\nname = ["n", "m"]\nquiet = true')
    assert given(args, FLAGS) == {"steps": 5, "lr": 1.0, "best": True, "kind": "b"}
    assert isinstance(args.lr, float) and args.out == Path("somewhere")
    assert (args.data, args.name, args.quiet) == (["x", "y"], ["n", "m"], True)


def test_flags_win(parse):
    text = 'steps = 5\nbest = true\nout = "a"\ndata = ["x", "y"]\nname = ["n"]'
    args = parse(text, "--steps", "7", "--no-best", "--out=b", "--data", "z", "--name", "k")
    assert given(args, FLAGS) == {"steps": 7, "best": False}
    assert (str(args.out), args.data, args.name) == ("b", ["z"], ["k"])


def test_false_and_underscores(parse):
    args = parse('best = false\nquiet = false\nout = "-odd"\nlr = -2.5')
    assert (args.best, args.quiet, str(args.out), args.lr) == (False, False, "-odd", -2.5)


def test_a_table_for_each_command_and_several_files(parse, tmp_path):
    second = tmp_path / "second.toml"
    second.write_text("steps = 9")
    args = parse('out = "a"\n[make]\nsteps = 6\nlr = 2\n[other]\nunknown = 1', files=[second])
    assert given(args, FLAGS) == {"steps": 9, "lr": 2.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz = 5", r"settings\.toml: stepz: got 5; allowed: steps\. See fastattn make --help"),
        ('steps = "many"', r"settings\.toml: steps: got 'many'; allowed: an integer"),
        ("steps = 1.5", "steps: got 1.5; allowed: an integer"),
        ("steps = true", "steps: got True; allowed: an integer"),
        ('lr = "1"', "lr: got '1'; allowed: a number"),
        ("best = 1", "best: got 1; allowed: true or false"),
        ("out = 1", "out: got 1; allowed: a string in quotes"),
        ('kind = "c"', "kind: got 'c'; allowed: a, b"),
        ("steps = [1, 2]", r"steps: got \[1, 2\]; allowed: a single value"),
        ("[train]\nsteps = 5", r"\[train\]: got a table of this name; allowed: make, other"),
        ('config = "x"', "config: got x; allowed"),
    ],
)
def test_what_is_wrong_is_said(parse, text, words):
    with pytest.raises(InputError, match=words):
        parse(text)


def test_not_a_file_and_not_toml(parse, tmp_path, capsys):
    with pytest.raises(DataError, match=r"settings\.toml is not TOML: .*line 1"):
        parse("steps == 5")
    assert main(["train", "--config", str(tmp_path / "none.toml")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "none.toml cannot be read: No such file" in message


def test_what_is_required_may_come_from_the_file_only(parse, capsys):
    with pytest.raises(SystemExit):
        parse("steps = 5")
    assert "required: --out" in capsys.readouterr().err


def test_every_command_takes_a_config():
    _, commands = make_parser()
    assert all("--config" in parser.format_help() for parser in commands.values())


def test_other_defaults():
    assert [flag.default for flag in with_defaults(FLAGS, {"lr": 5})] == [10, 5, False, "a"]
