"""The command line: the library's functions over files. What people read goes to stdout, errors to stderr."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shardwise.arguments import STRATEGIES, axis, gigabytes, names, positive
from shardwise.errors import JobError, LaunchError, PlanError, ProofError, ShardwiseError, UserError
from shardwise.graph.garbage import uncollected
from shardwise.inference.command import (
    add_generate_options,
    add_plan_options,
    add_precision_option,
    add_predict_options,
    generate,
    predict,
)
from shardwise.report.environment import installed
from shardwise.serving.command import add_options as add_serve_options

if TYPE_CHECKING:
    from shardwise.job import Job
    from shardwise.plan.plan import Plan


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 for a failed run or proof, 2 for a mistake of the user's, 130 for Ctrl-C."""
    try:
        arguments = _parser().parse_args(argv)
        with _quiet_stdout(arguments.json):
            found, status = arguments.run(arguments)
        if arguments.json and found is not None:
            print(json.dumps(found, indent=2))
        sys.stdout.flush()
        return int(status)
    except BrokenPipeError:
        _drop_stdout()
        return 141  # as a program that SIGPIPE ended
    except KeyboardInterrupt:
        print("\nshardwise: interrupted", file=sys.stderr)
        return 130
    except ShardwiseError as error:
        return _told(error, str(error), error.exit_status)
    except Exception as error:
        hint = "; this is a bug of Shardwise's, or of the code it was given; SHARDWISE_DEBUG=1 shows where"
        return _told(error, f"{type(error).__name__}: {error}{hint}", 1)


def _told(error: Exception, message: str, status: int) -> int:
    if os.environ.get("SHARDWISE_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"shardwise: error: {message}", file=sys.stderr)
    return status


@contextlib.contextmanager
def _quiet_stdout(json_wanted: bool) -> Iterator[None]:
    """With --json stdout is for the one JSON value; what else is printed, on ranks too, goes to stderr."""
    if not json_wanted:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _drop_stdout() -> None:
    """Nobody reads stdout any more, and Python would complain about it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- arguments --------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="shardwise", description="Split a PyTorch model and its data over devices, run it, prove it.")
    parser.add_argument("--version", action="version", version=f"shardwise {installed('shardwise') or 'from source'}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str, *, spec: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print one JSON value instead of text")
        if spec:
            made.add_argument("spec", metavar="SPEC", help="file.py:function or module:function, which returns a Job")
        return made

    demo = command("demo", _demo, "train a small language model on real text here, with evidence", spec=False)
    demo.add_argument("--ranks", type=positive, default=2, metavar="N", help="ranks to split over (2)")
    demo.add_argument("--steps", type=positive, default=None, metavar="N", help="updates of each run")
    demo.add_argument("--out", type=Path, default=Path("shardwise-demo"), metavar="DIR", help="folder of report.html")

    train = command("train", _train, "train a job on this machine's ranks, or on those that torchrun started")
    _ranks_option(train)
    train.add_argument("--plan", type=Path, metavar="FILE", help="the plan; without it one is chosen")
    train.add_argument("--steps", type=positive, default=100, metavar="N", help="updates (100)")
    _batch_option(train)
    train.add_argument("--save", type=Path, metavar="FILE", help="write the trained weights (.safetensors or .pt)")
    train.add_argument("--logs", type=Path, metavar="DIR", help="folder of the ranks' logs (kept only on failure)")

    predict = command("predict", _predict, "compute the outputs of a job's model for the samples of a file")
    _ranks_option(predict)
    add_predict_options(predict)

    generate = command("generate", _generate, "write the tokens that a job's model puts behind the prompts of a file")
    _ranks_option(generate)
    add_generate_options(generate)

    serve = command("serve", _serve, "answer requests for a job's outputs over HTTP")
    _ranks_option(serve)
    add_plan_options(serve)
    add_precision_option(serve)
    add_serve_options(serve)

    plan = command("plan", _plan, "choose how to split a job, and say why")
    _ranks_option(plan)
    _batch_option(plan)
    text = "machines: a name such as 16x8xh100-sxm, or a .toml file (this machine)"
    plan.add_argument("--cluster", metavar="C", help=text)
    text = "what the plan is for (train)"
    plan.add_argument("--for", dest="purpose", choices=("train", "predict"), default="train", help=text)
    text = "what counts: time, cost or memory (time); to predict, throughput, latency or memory (throughput)"
    plan.add_argument("--objective", default="", metavar="O", help=text)
    plan.add_argument("--memory", type=gigabytes, metavar="GB", help="a rank may use so much, if less than it has")
    text = "an axis (pipeline, data, expert, context or tensor) of a given size; 1 forbids it; may be repeated"
    plan.add_argument("--fix", type=axis, action="append", default=[], metavar="AXIS=N", help=text)
    plan.add_argument("--out", type=Path, metavar="FILE", help="write the plan, which `train --plan` reads")
    plan.add_argument("--html", type=Path, metavar="FILE", help="write why it is the one as a page for a browser")

    verify = command("verify", _verify, "prove that every strategy computes what one device computes")
    _ranks_option(verify)
    _batch_option(verify)
    verify.add_argument("--strategies", type=names, default=STRATEGIES, metavar="A,B", help=",".join(STRATEGIES))
    verify.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="to run in (float64)")
    verify.add_argument("--steps", type=positive, default=3, metavar="N", help="updates to compare after (3)")

    machine = command("machine", _machine, "measure this machine, which plans are priced on from then on", spec=False)
    machine.add_argument("--out", type=Path, metavar="FILE", help="write it there too, for --cluster elsewhere")

    command("env", _env, "what is installed, what is reachable", spec=False)
    return parser


def _ranks_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=positive, metavar="N", help="ranks (one for each accelerator, else core)")


def _batch_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=positive, metavar="N", help="samples of an update, instead of the job's own")


# --- commands: each prints for people, and returns what --json prints and the exit status -----------------------------

Answer = tuple[Any, int]


def _demo(arguments: argparse.Namespace) -> Answer:
    from shardwise.demo import demo

    steps = {} if arguments.steps is None else {"steps": arguments.steps}
    found = demo(ranks=arguments.ranks, out=arguments.out, terminal=sys.stdout.isatty(), **steps)
    return found.to_dict(), 0


def _train(arguments: argparse.Namespace) -> Answer:
    from shardwise.engine.launch import launched
    from shardwise.engine.train import train
    from shardwise.report.terminal import report

    _check_ranks(arguments)
    job, first = _job(arguments), _first()
    if arguments.plan is not None:
        chosen = _Choice(_read_plan(arguments.plan))
    else:
        chosen = _choose(job, _ranks(arguments))
        if first:
            print(f"{chosen.plan.text()}\n{chosen.why}\n", flush=True)
    ranks = None if launched() else arguments.ranks
    result = train(
        job,
        chosen.plan,
        steps=arguments.steps,
        ranks=ranks,
        spec=arguments.spec,
        log_dir=arguments.logs,
        save=arguments.save,
    )
    if first:
        print(report(chosen.plan, result, chosen.terms))
    return (result.to_dict() if first else None), 0


def _predict(arguments: argparse.Namespace) -> Answer:
    _check_ranks(arguments)
    return predict(arguments, _job(arguments), partial(_inference_plan, arguments)), 0


def _generate(arguments: argparse.Namespace) -> Answer:
    _check_ranks(arguments)
    return generate(arguments, _job(arguments), partial(_plan_of_steps, arguments)), 0


def _serve(arguments: argparse.Namespace) -> Answer:
    from shardwise.serving.command import serve

    job = _job(arguments)
    plan_of = _inference_plan if arguments.generate is None else _plan_of_steps
    return serve(arguments, job, plan_of(arguments, job)), 0


@uncollected()
def _plan(arguments: argparse.Namespace) -> Answer:
    from shardwise.report.planned import to_dict, why
    from shardwise.report.planned_html import page
    from shardwise.report.terminal import search_progress
    from shardwise.search.space import Options

    job = _job(arguments)
    if arguments.cluster is not None and arguments.ranks is not None:
        raise UserError("--cluster says how many ranks there are, so that --ranks cannot; leave out one of them")
    _check_data(job)
    options = Options(arguments.objective, arguments.memory, dict(arguments.fix), purpose=arguments.purpose)
    with search_progress() as tell:
        plan, explanation = why(job, arguments.cluster or _ranks(arguments), options, tell)
    print(f"{plan.text()}\n{plan.explain()}")
    written = {arguments.out: plan.text(), arguments.html: page(explanation) if explanation is not None else None}
    for path, text in written.items():
        if path is not None and text is not None:
            _write(path, text)
            print(f"\nwritten to {path}")
        elif path is not None:
            print(f"\n{path} is not written: a model that does not capture has no price to show")
    told = to_dict(explanation) if explanation is not None else None
    return {"plan": json.loads(plan.to_json()), "text": plan.text(), "why": plan.explain(), "explanation": told}, 0


def _verify(arguments: argparse.Namespace) -> Answer:
    import torch

    from shardwise.measure.verify import verify
    from shardwise.report.terminal import proof_failures, proof_table

    job = _job(arguments)
    dtype = {"float64": torch.float64, "float32": torch.float32}[arguments.dtype]
    rows = verify(
        job,
        _ranks(arguments),
        strategies=arguments.strategies,
        dtype=dtype,
        steps=arguments.steps,
        spec=arguments.spec,
    )
    found = [_row_dict(row) for row in rows]
    print(proof_table(found))
    wrong = proof_failures(found)
    if wrong and not arguments.json:
        raise ProofError(wrong)
    return found, 1 if wrong else 0


def _machine(arguments: argparse.Namespace) -> Answer:
    from shardwise.report.machine import measure_here

    return measure_here(arguments.out, _write), 0


def _env(arguments: argparse.Namespace) -> Answer:
    from shardwise.report.environment import environment, text

    found = environment()
    print(text(found))
    return found, 0


# --- their parts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """A plan, why it is the one, and the seconds of its terms."""

    plan: Plan
    why: str = ""
    terms: dict[str, float] | None = None


def _job(arguments: argparse.Namespace) -> Job:
    from shardwise.job import load_spec

    job = load_spec(arguments.spec)
    return job if arguments.batch is None else job.with_(global_batch=arguments.batch)


def _ranks(arguments: argparse.Namespace) -> int:
    """How many ranks: those of the launch, those asked for, or one for each accelerator or core of this machine."""
    import torch

    from shardwise.engine.launch import launched
    from shardwise.machine.backend import Backend, cores

    if launched():
        return int(os.environ["WORLD_SIZE"])
    if arguments.ranks is not None:
        return int(arguments.ranks)
    return torch.cuda.device_count() if Backend.detect().device_type == "cuda" else cores()


def _check_ranks(arguments: argparse.Namespace) -> None:
    """Check that no other number of ranks is asked for than a launch has that started this process."""
    from shardwise.engine.launch import launched

    if launched() and arguments.ranks not in (None, _ranks(arguments)):
        raise LaunchError(
            f"--ranks {arguments.ranks} is asked for, but this is one of {_ranks(arguments)} ranks that torchrun "
            f"started; leave --ranks out, or start {arguments.ranks} (torchrun --nproc-per-node {arguments.ranks})"
        )


def _first() -> bool:
    """Whether this process is the one that prints: it starts the ranks, or is the first one of a launch."""
    from shardwise.engine.launch import launched

    return not launched() or os.environ["RANK"] == "0"


def _choose(job: Job, ranks: int) -> _Choice:
    from shardwise.search.choose import choose

    _check_data(job)
    best = choose(job, ranks)[0]
    return _Choice(best.plan, best.reason, dict(best.terms))


def _check_data(job: Job) -> None:
    if job.samples() == 0:
        raise JobError("the dataset is empty; give it at least global_batch samples")


def _inference_plan(arguments: argparse.Namespace, job: Job, fixed: Mapping[str, int] | None = None) -> Plan | None:
    """The plan that was given, or is chosen and printed; None for a replica on each rank."""
    from shardwise.report.planned import why
    from shardwise.search.space import Options

    if arguments.plan is not None:
        return _read_plan(arguments.plan)
    if arguments.objective is None:
        return None
    options = Options(arguments.objective, fixed=fixed or {}, purpose="predict")
    plan: Plan = why(job, _ranks(arguments), options)[0]
    if _first():
        print(f"{plan.text()}\n{plan.explain()}\n", flush=True)
    return plan


def _plan_of_steps(arguments: argparse.Namespace, job: Job) -> Plan | None:
    """The same for a model that generates: a step has one position of each sample, which no axis can split."""
    if arguments.objective is not None and job.samples() == 0:
        raise JobError(
            "--objective chooses a plan for the job's own samples, of which there are 0; "
            "give the job some as data, or give a plan (--plan)"
        )
    return _inference_plan(arguments, job, fixed={"context": 1})


def _read_plan(path: Path) -> Plan:
    from shardwise.plan.plan import Plan

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise PlanError(
            f"the plan {path} cannot be read: {reason}; `shardwise plan SPEC --out {path}` writes one"
        ) from error
    return Plan.parse(text)


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}; give another path") from error


def _row_dict(row: Any) -> dict[str, Any]:
    found = asdict(row) if is_dataclass(row) and not isinstance(row, type) else dict(row)
    plan = row.plan
    return {**found, "plan": plan.text() if hasattr(plan, "text") else plan}


if __name__ == "__main__":
    sys.exit(main())
