"""Arguments of `attamba launch`, and what it does with them."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from attamba.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from attamba.launch.job import Request

TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")
"""Minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, as sbatch reads them."""
MEM = re.compile(r"\d+[KMGT]?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, as for attamba train")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="keys that differ from it, as for attamba train",
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    parser.add_argument("--gpus", type=int, required=True, help="ranks on each machine")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="on this machine, without SLURM")
    where.add_argument(
        "--folder", type=Path, help="of SLURM's scripts and logs (default: slurm/ in the run's)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be run, and run nothing"
    )
    parser.add_argument(
        "--restarts",
        type=int,
        metavar="N",
        default=0,
        help="go on from the last checkpoint after a failure, N times (default: 0)",
    )
    slurm = parser.add_argument_group("for SLURM, as sbatch takes them")
    slurm.add_argument("--time", metavar="LIMIT", help="minutes, HH:MM:SS or D-HH:MM:SS")
    slurm.add_argument("--partition")
    slurm.add_argument("--account")
    slurm.add_argument("--qos")
    slurm.add_argument("--constraint")
    slurm.add_argument("--cpus", type=int, help="cores of each machine")
    slurm.add_argument("--mem", metavar="SIZE", help="memory of each machine: 512G")
    slurm.add_argument(
        "--grace",
        type=int,
        metavar="SECONDS",
        help="before the time limit, in which ranks save (default: 300)",
    )
    slurm.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="of shell, before training: 'module load cuda'; repeatable",
    )


OF_REQUEST = ("time", "partition", "account", "qos", "constraint", "cpus", "mem", "grace", "setup")


def run(args: argparse.Namespace) -> int:
    """`attamba launch CONFIG [key=value ...]`."""
    _check(args)
    from attamba.config import load_run_config
    from attamba.train.checks import check_run

    config = load_run_config(args.config, args.overrides)
    check_run(config, args.nodes * args.gpus)  # before a job waits in a queue
    train = [args.config, *args.overrides]
    if args.local:
        from attamba.launch.job import run_here, torchrun

        print(shlex.join(torchrun(args.gpus, train)), flush=True)
        return 0 if args.dry_run else run_here(args.gpus, train, args.restarts)
    _need("submitit", "slurm")
    request = _request(args, config, train)
    if args.dry_run:
        print(f"{request.script()}\n# of which each machine runs\n# {request.job.shown()}")
        return 0
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ConfigError(
            "there is no sbatch and srun here, so no SLURM to submit to; --local trains on this "
            "machine, --dry-run prints the script"
        )
    number = request.submit()
    print(f"job {number} is in the queue; its logs: {request.folder}/{number}_0_log.out")
    return 0


def _request(args: argparse.Namespace, config: RunConfig, train: list[str]) -> Request:
    from attamba.launch.job import Job, Request

    given = {name: getattr(args, name) for name in OF_REQUEST if getattr(args, name) is not None}
    folder = (args.folder or Path(config.out) / "slurm").absolute()
    job = Job(args.nodes, args.gpus, train, args.restarts, folder)
    return Request(job, folder, f"attamba-{Path(config.out).name}", **given)


def _check(args: argparse.Namespace) -> None:
    for name in ("nodes", "gpus", "cpus", "grace", "restarts"):
        value, least = getattr(args, name), 0 if name == "restarts" else 1
        if value is not None and value < least:
            raise ConfigError(f"--{name}={value} must be at least {least}")
    if args.local:
        for name in OF_REQUEST:
            if getattr(args, name):
                raise ConfigError(f"--{name} is for SLURM and has no effect with --local")
        if args.nodes != 1:
            raise ConfigError(f"--nodes={args.nodes} with --local: this is one machine; leave it")
    if args.time is not None and not TIME.fullmatch(args.time):
        raise ConfigError(f"--time={args.time} is no limit; give minutes, HH:MM:SS or D-HH:MM:SS")
    if args.mem is not None and not MEM.fullmatch(args.mem):
        raise ConfigError(f"--mem={args.mem} is no size; give a number and K, M, G or T: 512G")


def _need(package: str, extra: str) -> None:
    if sys.modules.get(package) is None and importlib.util.find_spec(package) is None:
        raise ImportError(
            f"{package} is not installed; it comes with: pip install 'attamba[{extra}]'"
        )
