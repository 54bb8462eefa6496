"""The commands `predict` and `generate`: their options, and how they are run. Quick to import."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwise.arguments import numbers, positive, share, temperature, whole

if TYPE_CHECKING:
    from shardwise.job import Job
    from shardwise.plan.plan import Plan

PlanOf = Callable[["Job"], "Plan | None"]
"""The plan of a command's arguments for a job, which it may print."""


def add_plan_options(parser: argparse.ArgumentParser, *, as_for: str = "") -> None:
    """The options that say by which plan."""
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--plan", type=Path, metavar="FILE", help="the plan; without it a replica on each rank")
    text = f"have one chosen for throughput, latency or memory{as_for}"
    split.add_argument("--objective", choices=("throughput", "latency", "memory"), help=text)


def add_precision_option(parser: argparse.ArgumentParser) -> None:
    """The option that says in which numbers."""
    text = "how weights are held: fp32, bf16 or int8 (as the model has them)"
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), help=text)


# --- predict ----------------------------------------------------------------------------------------------------------


def add_predict_options(parser: argparse.ArgumentParser) -> None:
    """The options of `predict`, beside those that say which job, on how many ranks."""
    samples = parser.add_mutually_exclusive_group()
    text = "samples: .npy, .npz, .safetensors, .jsonl or .parquet (the job's own)"
    samples.add_argument("--input", type=Path, metavar="FILE", help=text)
    samples.add_argument("--data", metavar="SPEC", help="samples: a function that returns a Dataset")
    add = parser.add_argument
    text = "where the outputs go, of one of these types; a run that was killed goes on with it"
    add("--output", type=Path, metavar="FILE", required=True, help=text)
    add_plan_options(parser)
    add_precision_option(parser)
    add("--batch", type=positive, metavar="N", help="samples at a time, instead of the job's own")
    text = "batches that are computed in fp32 too, to say how far another precision is from it (1)"
    add("--compare", type=whole, default=1, metavar="N", help=text)


def predict(arguments: argparse.Namespace, job: Job, plan_of: PlanOf) -> dict[str, Any] | None:
    """Runs `predict`; what it did, None on a rank of a launch that writes nothing.

    Raises:
        UserError: the samples, the plan or the file do not fit.
        RunError: a rank failed.
    """
    from shardwise.files.inputs import open_inputs
    from shardwise.inference.identity import code_of, identity_of
    from shardwise.inference.predict_files import predict_file
    from shardwise.job import load_data

    run: dict[str, Any] = {"code": code_of(arguments.spec)}
    data = job.data
    if arguments.input is not None:
        data = open_inputs(arguments.input, job)
        run["input"] = identity_of(arguments.input)
    elif arguments.data is not None:
        data = load_data(arguments.data)
        run["input"] = code_of(arguments.data)
    plan = plan_of(job.with_(data=data))
    given = {name: getattr(arguments, name) for name in ("ranks", "spec", "precision", "compare")}
    found = predict_file(job, data, arguments.output, run=run, plan=plan, **given)
    if found is None:
        return None
    print(found.text())
    return found.to_dict()


# --- generate ---------------------------------------------------------------------------------------------------------

_HOW = ("ranks", "spec", "tokens", "temperature", "top_k", "top_p", "seed", "end", "piece")


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    """The options of `generate`, beside those that say which job, on how many ranks."""
    add = parser.add_argument
    text = "prompts: a list of tokens on each line of a .jsonl file, or in each row of one of predict's other types"
    add("--input", type=Path, metavar="FILE", required=True, help=text)
    add("--field", metavar="NAME", help="of lines and rows with fields: the one that has the tokens (the only one)")
    text = "where the new tokens go, .jsonl; a run that was killed goes on with it (stdout)"
    add("--output", type=Path, metavar="FILE", help=text)
    add("--tokens", type=positive, default=64, metavar="N", help="the most that follow a prompt (64)")
    text = "draw tokens, from logits divided by so much; without it the likeliest is taken"
    add("--temperature", type=temperature, metavar="T", help=text)
    add("--top-k", type=positive, metavar="K", help="draw from so many of the likeliest alone")
    text = "draw from the fewest likeliest whose probabilities make so much together"
    add("--top-p", type=share, metavar="P", help=text)
    add("--seed", type=whole, metavar="S", help="of the draws (the job's)")
    text = "tokens behind which nothing follows; the last that is given may be one of them"
    add("--end", type=numbers, default=(), metavar="A,B", help=text)
    add("--piece", type=positive, default=32, metavar="N", help="positions of a prompt that go in at once (32)")
    add(
        "--batch", type=positive, metavar="N", help="prompts of one length at a time, instead of the job's global_batch"
    )
    add_plan_options(parser, as_for=" of whole chunks, as for predict")


def generate(arguments: argparse.Namespace, job: Job, plan_of: PlanOf) -> dict[str, Any] | None:
    """Runs `generate`; what it did, None on a rank of a launch that gets no tokens.

    Without a file the tokens are what goes to stdout, and all else goes to stderr.

    Raises:
        UserError: the prompts, the plan or the file do not fit, or the model has no cache.
        RunError: a rank failed.
    """
    from shardwise.inference.generate_files import generate_file
    from shardwise.inference.identity import code_of, identity_of
    from shardwise.inference.prompts import read_prompts

    stdout = sys.stdout
    rows: list[list[int]] = []

    def give(row: list[int]) -> None:
        if arguments.json:
            rows.append(row)
        else:
            print(json.dumps(row), file=stdout, flush=True)

    with redirect_stdout(sys.stderr if arguments.output is None else stdout):
        prompts = read_prompts(arguments.input, arguments.field)
        plan = plan_of(job)
        run = {"code": code_of(arguments.spec), "input": [*identity_of(arguments.input), arguments.field]}
        given = {name: getattr(arguments, name) for name in _HOW}
        found = generate_file(job, prompts, arguments.output or give, run=run, plan=plan, **given)
        if found is None:
            return None
        print(found.text(), flush=True)
    return {**found.to_dict(), **({"rows": rows} if arguments.output is None else {})}
