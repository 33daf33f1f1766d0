"""Reads a command's arguments into its dataclass: from recipes and the command line, by jsonargparse.

jsonargparse's own `add_subcommands` would build the parsers of all twenty commands at every start, which takes longer
than reading the arguments of one; so a command's parser is built when the command is known.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from itertools import pairwise, takewhile
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from docstring_parser import parse as parse_docstring  # what jsonargparse reads the other arguments' help with
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from sssd_zoo import configs
from sssd_zoo.cli.commands import COMMANDS, COMPLETED
from sssd_zoo.cli.guard import fail
from sssd_zoo.cli.recipes import check_order, outdated
from sssd_zoo.configs.ranges import problems
from sssd_zoo.errors import UserError
from sssd_zoo.files import expand_home
from sssd_zoo.files.untrusted import check_recipe
from sssd_zoo.pipeline.defaults import BY_METHOD, DERIVED

# Arguments that are paths, or may be: a `~` in front of them is expanded, wherever they were given.
PATHS = (
    *("data", "pretrain_data", "test_data", "image_folder", "images", "out", "weights", "run", "calibrated", "also"),
    *("model", "models", "features", "teacher", "encoder", "init", "labels", "names", "index"),
)


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's help, with ranges in words."""

    def _expand_help(self, action: Any) -> str:
        return readable(super()._expand_help(action))


class DerivedHelpFormatter(HelpFormatter):
    """The help of a command that chooses some settings by the images and the device, which have no fixed default."""

    def _expand_help(self, action: Any) -> str:
        text = super()._expand_help(action)
        return (
            re.sub(r"default: [^()]*(\([^()]*\))?\)$", "default: derived)", text)
            if action.dest in DERIVED + BY_METHOD
            else text
        )


def readable(text: str) -> str:
    """What jsonargparse says, with ranges in words, "int of at least 1", and without hundreds of digits."""
    text, replaced = re.sub(r"(\d{20})\d{20,}", r"\1...", text).replace("typing.Annotated", "Annotated"), 1
    while replaced:  # the innermost first
        text, replaced = re.subn(r"Annotated\[((?:[^][]|\[[^][]*\])*), ([^][,]*)\]", r"\1 \2", text)
    return text


class WrongValue(Exception):
    """A value of another type than its argument's.

    Args:
        key: dotted name of the argument.
        message: jsonargparse's.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Parser(ArgumentParser):
    """jsonargparse's parser, with errors of one line that suggest the flag that was meant."""

    def __init__(self, **options: Any) -> None:
        """Takes jsonargparse's options; it makes another parser of this class for `--augment.help`."""
        nested = re.fullmatch(r"Help for (\S+)\.help=\S+", options.get("description") or "")
        described = {"description": f"The settings of {nested[1]}."} if nested else {}
        super().__init__(**{"formatter_class": HelpFormatter, **options, **described})
        self.wrong: list[str] = []  # a line about each value that was left out, as it is of another type

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints `message` on one line and exits with status 2; raises `WrongValue` where that is what is wrong."""
        if wrong := re.match(r'Parser key "(?!config")([\w.]+)":\s', message):
            raise WrongValue(wrong[1], message) from ex
        if self.wrong and "arguments are required" in message:  # of which some were given, with such a value
            raise UserError("; ".join(self.wrong)) from ex
        if "nrecognized arguments: " in message:
            known = [flag[2:] for flag in self._option_string_actions]
            flags = re.findall(r"--([\w.-]+)", message)
            message += did_you_mean(flags, known, "--")
            main = [flag for flag in ("data", "out") if flag in known]
            if not flags and main:
                message += f"; images and results are given by {' and '.join(f'--{flag}' for flag in main)}"
        fail(f"{readable(message)} (see {self.prog} --help)")


def did_you_mean(words: Sequence[str], known: Sequence[str], prefix: str = "") -> str:
    """The end of an error message about mistyped words: '; did you mean --data?', or ''.

    What is known in several places is proposed in each: 'pretrain.epochs or distill.epochs' for 'epochs'.
    """
    meant = []
    for word in words:
        places = [name for name in known if name.endswith(f".{word}") and name.count(".") == 1]
        if close := places or get_close_matches(word, known, n=1):
            meant.append(" or ".join(f"{prefix}{name}" for name in close))
    return f"; did you mean {', '.join(meant)}?" if meant else ""


def _parser(name: str, prog: str) -> Parser:
    arguments, positional = getattr(configs, COMMANDS[name].arguments), dict(COMMANDS[name].positional)
    document = parse_docstring(arguments.__doc__)
    paragraphs = [document.short_description, document.long_description]
    if name in COMPLETED:
        paragraphs.append(
            "Defaults marked 'derived' depend on the images, the device and the method; a run first lists them."
        )
    parser = Parser(
        prog=prog,
        allow_abbrev=False,
        formatter_class=DerivedHelpFormatter if name in COMPLETED else HelpFormatter,
        description=" ".join(filter(None, paragraphs)),
    )
    parser.add_argument(
        "--config", action="config", help="Recipe: a YAML file of these arguments; later ones override it."
    )
    next(action for action in parser._actions if action.dest == "print_config").metavar = "[=FLAGS]"
    described = {argument.arg_name: argument.description for argument in document.params}
    for argument, words in positional.items():
        parser.add_argument(argument, nargs=words, metavar=argument.upper(), help=described[argument])
    parser.add_class_arguments(arguments, skip=set(positional))
    for group in parser._action_groups:
        if group.title == (document.short_description or "").rstrip("."):  # the parser's description says it already
            group.title = "arguments"
    return parser


def switches(config: Any, prefix: str = "--") -> set[str]:
    """The options of a dataclass, and of the dataclasses in it, that are true or false."""
    flags: set[str] = set()
    for name, kind in get_type_hints(config).items():
        inner = next(filter(is_dataclass, (kind, *get_args(kind))), None)
        if inner is not None:
            flags |= switches(inner, f"{prefix}{name}.")
        elif bool in (kind, *get_args(kind)):
            flags.add(prefix + name)
    return flags


def spell_out(arguments: list[str], config: Any) -> list[str]:
    """Writes `--resume` as `--resume true`, which is what jsonargparse understands, and `--dry-run` as `--dry_run`."""
    names, words = switches(config), []
    arguments = join_trackers(arguments)
    arguments = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in arguments]
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        words.append(word)
        if word in names and following.lower() not in ("true", "false", "yes", "no", "null"):
            words.append("true")
    return words


def join_trackers(arguments: list[str]) -> list[str]:
    """Writes `--trackers wandb mlflow` as `--trackers [wandb,mlflow]`, which is what jsonargparse understands."""
    if "--trackers" not in arguments:
        return arguments
    start = arguments.index("--trackers") + 1
    names = list(takewhile(lambda word: word[:1].isalpha(), arguments[start:]))
    return [*arguments[:start], *([f"[{','.join(names)}]"] if names else []), *arguments[start + len(names) :]]


def keep_names(words: list[str], config: Any) -> list[str]:
    """Writes `--data [photos]` as `--data ./[photos]` where a file or folder has that name, which is then no list.

    Args:
        words: what `spell_out` gives, in which every flag has one value.
        config: the command's dataclass.
    """
    hints = get_type_hints(config)
    lists = {f"--{name}": hints[name] for name in PATHS if list[str] in (hints.get(name), *get_args(hints.get(name)))}
    kept, flag = [], ""
    for word in words:
        name, _, value = (flag, "", word) if flag in lists else word.partition("=")
        flag = word
        if name in lists and value.startswith("[") and os.path.lexists(value):
            text = lists[name] != list[str] and str in get_args(lists[name])
            word = word.removesuffix(value) + (f"./{value}" if text else json.dumps([value]))
        kept.append(word)
    return kept


def name_network(words: list[str], argument: str, prog: str) -> list[str]:
    """Writes `linear RUN` as `linear --model=RUN`.

    Args:
        words: what `spell_out` gives, in which every flag has one value.
        argument: the name of the flag, such as 'model'.
        prog: the program's name, for the error.

    Raises:
        UserError: if the flag on the command line gives another network.
    """
    flag, named = f"--{argument}", None
    by_position, others = [], []
    following = iter(words)
    for word in following:
        if not word.startswith("-"):
            by_position.append(word)
            continue
        others.append(word)
        name, _, value = word.partition("=")
        if "=" not in word and (value := next(following, "")):
            others.append(value)
        named = value if name == flag else named
    if not by_position:
        return words
    network, *unknown = by_position
    if named not in (None, network):
        raise UserError(f"{network} and {flag} {named} are two networks: give one, as in {prog} {network}")
    return [*others, f"{flag}={network}", *unknown]


def expand_paths(config: Any) -> Any:
    """Expands `~` in the paths of a dataclass, and of the dataclasses in it; raises `UserError` if it is nobody's."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            expand_paths(value)
        elif field.name in PATHS and isinstance(value, str):
            setattr(config, field.name, expand_home(value))
        elif field.name in PATHS and isinstance(value, list):
            setattr(config, field.name, [expand_home(path) for path in value])
    return config


def recipes_in(words: list[str]) -> list[str]:
    """The values of `--config`.

    Raises:
        UserError: for one that is no file, or that is large or becomes so when it is parsed, or overrides an argument.
    """
    pairs = (word.split("=", 1) if "=" in word else [word, after] for word, after in pairwise([*words, ""]))
    given = [(name.removeprefix("--"), value) for name, value in pairs if name.startswith("--")]
    recipes = [value for name, value in given if name == "config"]
    for recipe in recipes:
        check_recipe(recipe)
    check_order((name, value if name == "config" else loaded(value)) for name, value in given)
    return recipes


def contradictions(parsed: Any, config: Any) -> list[str]:
    """What the dataclasses in a dataclass refuse of their values, each of which is in its range: a line of each."""
    refused: list[str] = []
    for name, kind in get_type_hints(config).items():
        if is_dataclass(kind):
            build(kind, parsed[name], name, refused)
    return refused


def build(kind: Any, values: Any, name: str, refused: list[str]) -> Any:
    """A dataclass, with those in it, of parsed values; what it refuses is added to `refused`, and None is given."""
    before, settings = len(refused), dict(vars(values))
    for field, hint in get_type_hints(kind).items():
        inner = next((option for option in (hint, *get_args(hint)) if is_dataclass(option)), None)
        if inner is not None and settings[field] is not None:
            settings[field] = build(inner, settings[field], f"{name}.{field}", refused)
    if len(refused) > before:
        return None
    try:
        return kind(**settings)
    except ValueError as error:  # a SettingsError
        refused.append(f"{name}: {error}")
        return None


def parse(parser: Parser, words: list[str], config: Any) -> tuple[Any, list[str]]:
    """The arguments that are given, less those of another type than theirs, and a line about each of these.

    Raises:
        UserError: where such a value comes from a recipe, so that the others cannot be read.
    """
    wrong = parser.wrong
    while True:
        try:
            return parser.parse_args(words, defaults=False), wrong
        except WrongValue as error:
            message = str(error)
            words, value = without(words, error.key)
            found = value if value is not None else re.split(r"(?:Got|Given) value: ", message)[-1]
            nested = loaded(found)
            for part in reversed(error.key.split(".")):
                nested = {part: nested}
            wrong += problems(nested, config) or [readable(message)]
            if value is None:
                raise UserError("; ".join(wrong)) from error


def loaded(text: str) -> Any:
    """A word of the command line as jsonargparse takes it: YAML, or else the text itself."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # also of numbers with thousands of digits
        return text


def without(words: list[str], key: str) -> tuple[list[str], str | None]:
    """Words of the command line without a flag and its value, and this value; None where they have no such flag."""
    left, value, following = [], None, iter(words)
    for word in following:
        name, _, after = word.partition("=")
        if name != f"--{key}":
            left.append(word)
        else:
            value = after if "=" in word else next(following, "")
    return left, value


def read_arguments(name: str, words: list[str], prog: str) -> tuple[Any, frozenset[str]]:
    """The arguments of one command, as its dataclass, and the names of those that were given.

    Names in it are dotted where the dataclass has others in it: 'pretrain.batch_size'.

    Raises:
        UserError: that names all values out of their ranges.
        SystemExit: for words that are no arguments, and after the help.
    """
    config = getattr(configs, COMMANDS[name].arguments)
    parser = _parser(name, prog)
    words = keep_names(spell_out(words, config), config)
    if network := COMMANDS[name].network:
        words = name_network(words, network, prog)
    recipes = recipes_in(words)
    try:
        given, mistyped = parse(parser, words, config)
    except UserError:
        raise
    except (ArithmeticError, RecursionError, ValueError) as error:  # of numbers and YAML that no parser copes with
        raise UserError(f"cannot read the arguments: {error} (see {prog} --help)") from error
    values = dict(given.items())
    if name in COMPLETED and recipes:
        typed = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
        anew = outdated(recipes, typed, values)
        values = {key: value for key, value in values.items() if key not in anew}
    parsed = parser.get_defaults()
    for key, value in values.items():
        parsed[key] = value
    if wrong := mistyped + problems(parsed.as_dict(), config) or contradictions(parsed, config):
        raise UserError("; ".join(wrong))
    try:
        instantiated = dict(vars(parser.instantiate(parsed)))
        instantiated.pop("config", None)
        settings = config(**instantiated)
    except ValueError as error:  # a SettingsError, which jsonargparse may wrap
        raise UserError(str(error)) from error
    return expand_paths(settings), frozenset(values)
