"""The verbs that build no model, and so need no LightningCLI: judge and compare.

Each takes its part of the command line; cli.py chooses the verb and prints the errors.
"""

from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from llama_lightning.errors import UsageError
from llama_lightning.evaluation.judge import JudgeConfig
from llama_lightning.usage import check_keys, group_arguments, plain_reason


def _parser(verb: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"python -m llama_lightning {verb}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="append", help="a YAML file")
    parser.add_class_arguments(JudgeConfig, "judge")
    return parser


def _parse(parser: ArgumentParser, arguments: list[str], groups: tuple[str, ...]) -> Namespace:
    """Parse a command line, of whose config files only some groups are read."""
    check_keys(arguments, parser.get_defaults().keys(), groups=groups)
    return parser.parse_args([*group_arguments(arguments, groups), *arguments])


def judge(arguments: list[str]) -> None:
    """Grade a file of responses."""
    from llama_lightning.evaluation.grading import check_excluded, grade_file

    parser = _parser(
        "judge", "Grade a file of responses. Keys of the config that are not here are not read."
    )
    parser.add_argument("--responses.path", help="what predict wrote, or a JSON list of records")
    try:
        given = _parse(parser, arguments, ("judge", "responses"))
    except ArgumentError as error:
        raise UsageError(plain_reason(str(error))) from error
    if given.responses.path is None:
        raise UsageError(
            "responses.path: not given; name the file that predict wrote, "
            "e.g. --responses.path lightning_logs/version_1/responses.jsonl"
        )
    if given.judge.backend == "none":  # so says the config.yaml of a run that graded nothing
        given.judge.backend = "prometheus"
    config = JudgeConfig(**vars(given.judge))
    check_excluded(config, grade_file(config, Path(given.responses.path)))


def compare(arguments: list[str]) -> None:
    """Compare two judged runs."""
    from llama_lightning.evaluation.compare import compare

    parser = _parser(
        "compare",
        "Compare two runs that the same judge has graded, prompt by prompt. With judge.backend "
        "that judge also sees both responses to each prompt and names the better one.",
    )
    parser.add_argument("A", help="a folder with a judged run, or the verdicts.jsonl in it")
    parser.add_argument("B", help="another, on the same prompts")
    parser.add_argument("--output", metavar="DIR", help="folder of compare.html; by default B's")
    try:
        given = _parse(parser, arguments, ("judge",))
    except ArgumentError as error:
        raise UsageError(f"{' '.join(str(error).split())}; use: compare A B") from error
    config = JudgeConfig(**vars(given.judge))
    folder = given.output or config.output
    compare(Path(given.A), Path(given.B), Path(folder) if folder else None, config)
