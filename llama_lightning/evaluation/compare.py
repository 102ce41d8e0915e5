"""Two judged runs of the same prompts: which is better, by how much, and is that settled.

The grades of one prompt go together: the interval is that of their difference, prompt by prompt.
"""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from llama_lightning.errors import JudgeError, UsageError
from llama_lightning.evaluation.comparison import Comparison, compare_differences
from llama_lightning.evaluation.duels import Orders, count_orders
from llama_lightning.evaluation.judge import JudgeConfig
from llama_lightning.evaluation.judged import JudgedRun, open_run
from llama_lightning.evaluation.page import Pair, compare_page
from llama_lightning.evaluation.pairwise import judge_pairs
from llama_lightning.evaluation.report import Graded
from llama_lightning.evaluation.verdicts import write_whole

PAGE = "compare.html"


def _check_settings(a: JudgedRun, b: JudgedRun) -> None:
    for field in a.settings._fields:
        one, other = getattr(a.settings, field), getattr(b.settings, field)
        if one != other:
            raise UsageError(
                f"A and B were judged differently: {field} is {one} in {a.folder} and {other} in "
                f"{b.folder}; judge both in the same way"
            )


def _pairs(a: JudgedRun, b: JudgedRun, rows_a: list[Graded], rows_b: list[Graded]) -> list[Pair]:
    """Put together what answers the same prompt.

    Raises:
        JudgeError: nothing does, or one id stands for two prompts.
    """
    index = {(graded.response.id, graded.response.sample): graded for graded in rows_a}
    pairs = [
        Pair(index[key], graded)
        for graded in rows_b
        if (key := (graded.response.id, graded.response.sample)) in index
    ]
    if not pairs:
        raise JudgeError(
            f"{a.folder} and {b.folder} have no id in common; compare answers to the same prompts"
        )
    fields = ["instruction", "input"] + ["reference"] * a.settings.with_reference
    for pair in pairs:
        for field in fields:
            if getattr(pair.a.response, field) != getattr(pair.b.response, field):
                raise JudgeError(
                    f"id {pair.a.response.id} has another {field} in {a.folder} than in "
                    f"{b.folder}; compare answers to the same prompts"
                )
    return pairs


def _by_prompt(pairs: list[Pair], values: Iterable[int | None]) -> list[float]:
    """Compute a mean a prompt: the samples of one prompt are no prompts of their own."""
    by_prompt: dict[int | str, list[int]] = {}
    for pair, value in zip(pairs, values, strict=True):
        if value is not None:
            by_prompt.setdefault(pair.a.response.id, []).append(value)
    return [mean(values) for values in by_prompt.values()]


def _judge_pairwise(
    config: JudgeConfig, pairs: list[Pair], folder: Path, runs: list[Path]
) -> tuple[list[Pair], Comparison, Orders]:
    """Ask a judge for the better one of each pair and put what it says beside the pair."""
    shown = pairs[: config.limit]
    duels = judge_pairs(config, [(p.a.response, p.b.response) for p in shown], folder, runs)
    orders = count_orders(duels)
    scores = _by_prompt(shown, (duel.score for duel in duels))
    if not scores:
        raise JudgeError(f"the judge chose between no pair: {orders.reasons}")
    prompts = {pair.a.response.id for pair in shown}
    comparison = compare_differences(scores, missing=len(prompts) - len(scores))
    shown = [pair._replace(duel=duel) for pair, duel in zip(shown, duels, strict=True)]
    return shown + pairs[len(shown) :], comparison, orders


def _check_excluded(config: JudgeConfig, orders: Orders) -> None:
    missing = orders.excluded.total()
    if missing > config.max_excluded_fraction * orders.pairs:
        raise JudgeError(
            f"{missing} of {orders.pairs} pairs have no choice ({orders.reasons}), more than "
            f"judge.max_excluded_fraction {config.max_excluded_fraction:g} allows; {PAGE} is "
            "written"
        )


def compare(
    a: Path, b: Path, output: Path | None = None, config: JudgeConfig | None = None
) -> Comparison:
    """Compare two judged runs and write compare.html.

    Args:
        a: a folder with a judged run, or the verdicts.jsonl in it.
        b: another.
        output: folder of compare.html; by default that of B.
        config: a judge that is to choose between the two responses of each pair; with backend none,
            or by default, nobody is asked.

    Raises:
        UserError: they cannot be compared; or, once the page is written, too many pairs are left
            without a choice.
    """
    run_a, run_b = open_run(a), open_run(b)
    _check_settings(run_a, run_b)
    rows_a, rows_b = run_a.graded(), run_b.graded()
    pairs = _pairs(run_a, run_b, rows_a, rows_b)
    differences = _by_prompt(pairs, (pair.difference for pair in pairs))
    if not differences:
        raise JudgeError(f"no prompt has a grade both in {run_a.folder} and in {run_b.folder}")
    ids_a, ids_b = ({graded.response.id for graded in rows} for rows in (rows_a, rows_b))
    common = {pair.a.response.id for pair in pairs}
    comparison = compare_differences(
        differences,
        missing=len(common) - len(differences),
        only_a=len(ids_a - common),
        only_b=len(ids_b - common),
    )
    facts = [
        ("A", str(run_a.folder)),
        ("B", str(run_b.folder)),
        ("judge", run_a.settings.judge),
        ("B - A, 95 % interval", comparison.interval),
        ("prompts", f"{comparison.pairs}: {comparison.counts} of B"),
        ("verdict", comparison.verdict),
    ]
    if comparison.left_out:
        facts.insert(-1, ("left out", comparison.left_out))
    folder = output or run_b.folder
    said, orders = str(comparison), None
    if config is not None and config.backend != "none":
        runs = [run_a.folder, run_b.folder]
        pairs, choices, orders = _judge_pairwise(config, pairs, folder, runs)
        facts += [
            ("pairwise, judge", orders.judge or "none: all pairs are equal"),
            ("pairwise, net wins of B a prompt", choices.interval),
            ("pairwise, prompts", f"{choices.pairs}: {choices.counts} of B"),
            ("pairwise, verdict", choices.verdict),
            ("pairwise, orders", str(orders)),
        ]
        said += f"\npairwise, {choices}; {orders}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / PAGE, compare_page(facts, pairs))
    except OSError as error:
        raise UsageError(f"--output {folder} cannot be written ({error.strerror})") from error
    print(f"{said}\nboth responses to each prompt: {folder / PAGE}")
    if config is not None and orders is not None:
        _check_excluded(config, orders)
    return comparison
